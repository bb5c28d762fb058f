"""Benchmark scores by lm-eval: python -m eval.run runs/NAME HF_FOLDER ckpt.pt --tasks paper --shots 0 5

Scores run folders, checkpoints, Hugging Face GPT-2 folders and .pt files of nanoGPT or MARS by one and the same
code, on all ranks under torchrun. Finished tasks are kept in results.json at once, so the same command continues an
interrupted evaluation.
"""

import argparse
import io
import json
import sys
import time
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import torch

from eval.checkpoint import Trained, open_trained
from eval.command import model_parser
from eval.scoring import Scorer, harness_model
from eval.table import SIZES, comma_separated, markdown, size_of
from eval.tasks import Tasks, metric_of
from runtime.command import one_line
from runtime.distributed import World, start_world
from runtime.files import write_durably, write_json
from runtime.logger import WANDB_ID

RESULTS = "results.json"


class Results:
    """The records of results.json in a folder, one for each model, task and number of shots; written by rank 0."""

    def __init__(self, folder: Path, world: World) -> None:
        self.path, self.main, self.scores = folder / RESULTS, world.is_main, []
        problem = self._read() if self.main else None
        self.scores, problem = world.from_main((self.scores, problem))
        if problem:
            raise ValueError(f"{self.path}: {problem}; repair it or choose another --out")

    def _read(self) -> str | None:
        """Take up the records that are there; says what is wrong with them."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.scores = [dict(score) for score in json.loads(self.path.read_text(encoding="utf-8"))["scores"]]
        except OSError as error:
            return error.strerror or str(error)
        except (ValueError, KeyError, TypeError):
            return "not a results file"
        return None

    def find(self, wanted: dict) -> dict | None:
        """The record that agrees with every entry of `wanted`."""
        return next((s for s in self.scores if all(s.get(k) == v for k, v in wanted.items())), None)

    def add(self, score: dict) -> None:
        """Keep a record and write the file whole."""
        self.scores.append(score)
        if self.main:
            write_json(self.path, {"format": 1, "scores": self.scores})


def score_task(trained: Trained, scorer: Scorer, tasks: Tasks, name: str, shots: int, limit: int | None) -> dict:
    """Run one task on one model, on all ranks alike: they share the scoring. ValueError if its data cannot be had."""
    from lm_eval.evaluator import evaluate

    world, loaded, problem = scorer.world, None, None
    try:
        loaded = tasks.load(name, shots)
    except ValueError as error:
        problem = str(error)
    if problem := next((p for p in world.gather(problem) if p), None):
        raise ValueError(problem)
    truncated, scored = scorer.truncated, scorer.scored
    start = time.perf_counter()
    with nullcontext() if world.is_main else redirect_stderr(io.StringIO()):  # one progress bar, not one a rank
        results = evaluate(harness_model(scorer, trained.tokenizer), loaded, limit=limit, log_samples=False)
    if results is None:  # only the first rank of a machine gets them
        results = {}
    results = world.from_main({k: results.get(k, {}) for k in ("results", "groups", "n-samples")})
    numbers = {**results["results"], **results["groups"]}[name]
    metric = metric_of(name, numbers)
    error = numbers.get(f"{metric}_stderr,none")
    return {
        "score": float(numbers[f"{metric},none"]),
        "stderr": float(error) if isinstance(error, int | float) else None,
        "metric": metric,
        "all_metrics": {k: v for k, v in numbers.items() if isinstance(v, int | float)},
        "documents": sum(c["effective"] for c in results["n-samples"].values()),
        "requests": scorer.scored - scored,
        "requests_cut_on_the_left": scorer.truncated - truncated,
        "prefix_token": trained.tokenizer.eot,
        "seconds": round(time.perf_counter() - start, 1),
    }


def to_wandb(trained: Trained, scores: list[dict], choice: str) -> str | None:
    """Write scores into the summary of a run's wandb page; says what happened, None if there is no page.

    choice: "auto" for runs that logged online; "on" also for runs that logged offline and were synced since.
    """
    folder = trained.run_folder
    if choice == "off" or not scores or folder is None or not (folder / WANDB_ID).exists():
        return None
    log, run_id = trained.state["config"].get("log", {}), (folder / WANDB_ID).read_text()
    if choice == "auto" and log.get("wandb") != "online":
        return f"wandb run {run_id} is offline: `wandb sync` it, then the same command with --wandb on adds the scores"
    try:
        import wandb

        run = wandb.init(id=run_id, resume="must", project=log.get("project"), dir=str(folder))
        for s in scores:
            run.summary[f"eval/{s['task']}/{s['shots']}-shot/{s['metric']}"] = s["score"]
        run.finish()
    except Exception as error:
        return f"wandb did not take the scores ({error}); {RESULTS} has them, the same command tries again"
    return f"scores written to wandb run {run_id}"


def evaluate_all(args: argparse.Namespace, world: World) -> tuple[list[dict], list[str], list[int]]:
    """Score every model on every task; returns this command's records, what failed, and the parameter counts."""
    tasks = Tasks(args.tasks, args.include_path, args.task_data)
    results, mine, problems, parameters = Results(args.out, world), [], [], []
    for path in args.models:
        trained = open_trained(path, world.device, args.tokenizer, args.ranks)
        if any(s["checkpoint"] == trained.name for s in mine):
            trained.name = str(path)
        parameters.append(trained.model.num_params())
        scorer, scores = Scorer(trained.model, args.batch_tokens, world), []
        for shots in args.shots:
            for name in tasks.names:
                key = {"sha256": trained.sha256, "task": name, "shots": shots, "limit": args.limit}
                key |= {"harness": tasks.version, "tokenizer": trained.tokenizer.name, "data": args.task_data}
                score = results.find(key)
                if score is None:
                    try:
                        score = score_task(trained, scorer, tasks, name, shots, args.limit)
                    except ValueError as error:
                        problems.append(str(error))
                        if world.is_main:
                            print(f"eval.run: {error}", file=sys.stderr)
                        continue
                    facts = {"checkpoint": trained.name, "path": str(trained.path), "step": trained.state.get("step")}
                    score = facts | key | score | {"dtype": "float32", "device": str(world.device)}
                    results.add(score)
                scores.append(score | {"checkpoint": trained.name})
                if world.is_main:
                    print(describe(scores[-1]), flush=True)
        mine += scores
        if world.is_main and (said := to_wandb(trained, scores, args.wandb)):
            print(said)
    return mine, problems, parameters


def describe(score: dict) -> str:
    """A record in one line."""
    error = "" if score["stderr"] is None else f" +- {100 * score['stderr']:.2f}"
    cut = score["requests_cut_on_the_left"]
    note = f", {cut} of {score['requests']} requests cut on the left" if cut else ""
    what = f"{score['checkpoint']}  {score['task']}, {score['shots']}-shot"
    return f"{what}  {score['metric']} {100 * score['score']:.2f}{error}{note}"


def write_tables(args: argparse.Namespace, scores: list[dict], parameters: list[int]) -> None:
    """The table on screen, in markdown and as CSV, with the published rows of the models' sizes."""
    sizes = [s for s in SIZES if s in map(size_of, parameters)] if args.published == "auto" else [args.published]
    text = markdown(scores, sizes)
    write_durably(args.out / "table.md", text.encode())
    write_durably(args.out / "table.csv", comma_separated(scores, sizes).encode())
    print(f"\n{text}\nwritten to {args.out}: {RESULTS}, table.md, table.csv")


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.run", "Score models on benchmark tasks.")
    parser.add_argument("models", nargs="+", help="runs, checkpoints, Hugging Face folders, .pt files, gpt2")
    parser.add_argument("--tasks", nargs="+", default=["paper"], help='"paper" (the nine of the papers) or task names')
    parser.add_argument("--shots", nargs="+", type=int, default=[0], help="worked examples before each question")
    parser.add_argument("--include_path", help="folder with task files of your own")
    parser.add_argument("--task_data", "--data", help="folder of TASK/SPLIT.jsonl, read instead of the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder of results.json and the tables")
    parser.add_argument("--limit", type=int, help="first documents of each task only; for trying things out")
    parser.add_argument("--published", choices=("auto", "none", *SIZES), default="auto", help="published rows to show")
    parser.add_argument("--batch_tokens", type=int, help="tokens a forward pass; default: as many as fit")
    parser.add_argument("--wandb", choices=("auto", "on", "off"), default="auto", help="write to the run's wandb page")
    args = parser.parse_args(argv)
    left = f"interrupted; the same command continues with the tasks that are left ({args.out}/{RESULTS})"
    with one_line("eval.run", left):
        if min(args.shots) < 0 or any(n is not None and n < 1 for n in (args.limit, args.batch_tokens)):
            raise ValueError("--shots must not be negative, --limit and --batch_tokens must be at least 1")
        with start_world(args.device) as world:
            torch.set_float32_matmul_precision("highest")
            scores, problems, parameters = evaluate_all(args, world)
            if scores and world.is_main:
                write_tables(args, scores, parameters)
    if problems:
        sys.exit(f"eval.run: {len(problems)} of the tasks could not be run; see above")


if __name__ == "__main__":
    main()
