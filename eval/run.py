"""Benchmark scores by lm-eval: python -m eval.run runs/NAME HF_FOLDER ckpt.pt --tasks paper --shots 0 5

Scores run folders, checkpoints, Hugging Face GPT-2 folders and .pt files of nanoGPT or MARS by one and the same
code. Finished tasks are kept in results.json at once, so the same command continues an interrupted evaluation.
"""

import argparse
import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: python eval/run.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.shards import write_durably
from eval.checkpoint import Trained, open_trained
from eval.scoring import Scorer, harness_model
from eval.table import SIZES, comma_separated, markdown, size_of
from eval.tasks import Tasks, metric_of
from runtime.distributed import resolve_device
from runtime.logger import WANDB_ID

RESULTS = "results.json"


class Results:
    """The records of results.json in a folder, one for each model, task and number of shots."""

    def __init__(self, folder: Path) -> None:
        self.path, self.scores = folder / RESULTS, []
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            try:
                self.scores = json.loads(self.path.read_text(encoding="utf-8"))["scores"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}: not a results file; repair it or choose another --out") from None

    def find(self, wanted: dict) -> dict | None:
        """The record that agrees with every entry of `wanted`."""
        return next((s for s in self.scores if all(s.get(k) == v for k, v in wanted.items())), None)

    def add(self, score: dict) -> None:
        """Keep a record and write the file whole."""
        self.scores.append(score)
        write_durably(self.path, (json.dumps({"format": 1, "scores": self.scores}, indent=1) + "\n").encode())


def score_task(trained: Trained, scorer: Scorer, tasks: Tasks, name: str, shots: int, limit: int | None) -> dict:
    """Run one task on one model. Raises ValueError if its data cannot be had."""
    from lm_eval.evaluator import evaluate

    loaded = tasks.load(name, shots)
    truncated, scored = scorer.truncated, scorer.scored
    start = time.perf_counter()
    results = evaluate(harness_model(scorer, trained.tokenizer), loaded, limit=limit, log_samples=False)
    numbers = {**results["results"], **results.get("groups", {})}[name]
    metric = metric_of(name, numbers)
    error = numbers.get(f"{metric}_stderr,none")
    counts = results.get("n-samples", {})
    return {
        "score": float(numbers[f"{metric},none"]),
        "stderr": float(error) if isinstance(error, int | float) else None,
        "metric": metric,
        "all_metrics": {k: v for k, v in numbers.items() if isinstance(v, int | float)},
        "documents": sum(c["effective"] for c in counts.values()),
        "requests": scorer.scored - scored,
        "requests_cut_on_the_left": scorer.truncated - truncated,
        "prefix_token": trained.tokenizer.eot,
        "seconds": round(time.perf_counter() - start, 1),
    }


def to_wandb(trained: Trained, scores: list[dict]) -> str | None:
    """Write scores into the summary of a run's wandb page; says what happened, None if it has no page."""
    folder = trained.run_folder
    log = trained.state.get("config", {}).get("log", {})
    if folder is None or not (folder / WANDB_ID).exists() or not scores or log.get("wandb") != "online":
        return None  # an offline run cannot be reopened: its second folder would replace the first when synced
    try:
        import wandb

        run_id = (folder / WANDB_ID).read_text()
        run = wandb.init(id=run_id, resume="must", project=log["project"], dir=str(folder))
        for s in scores:
            run.summary[f"eval/{s['task']}/{s['shots']}-shot/{s['metric']}"] = s["score"]
        run.finish()
    except Exception as error:
        return f"wandb did not take the scores ({error}); {RESULTS} has them"
    return f"scores written to wandb run {run_id}"


def evaluate_all(args: argparse.Namespace) -> tuple[list[dict], list[str], int]:
    """Score every model on every task; returns this command's records, what failed, and the first parameter count."""
    tasks = Tasks(args.tasks, args.include_path, args.data)
    results, device = Results(args.out), resolve_device(args.device)
    mine, problems, parameters = [], [], 0
    for path in args.models:
        trained = open_trained(path, device, args.tokenizer, args.ranks)
        if any(s["checkpoint"] == trained.name for s in mine):
            trained.name = str(path)
        parameters = parameters or trained.model.num_params()
        scorer = Scorer(trained.model, args.batch_tokens)
        fresh = []
        for shots in args.shots:
            for name in tasks.names:
                key = {"sha256": trained.sha256, "task": name, "shots": shots, "limit": args.limit}
                key |= {"harness": tasks.version, "tokenizer": trained.tokenizer.name}
                score = results.find(key)
                if score is None:
                    try:
                        score = score_task(trained, scorer, tasks, name, shots, args.limit)
                    except ValueError as error:
                        problems.append(str(error))
                        print(f"eval.run: {error}", file=sys.stderr)
                        continue
                    facts = {"checkpoint": trained.name, "path": str(trained.path), "step": trained.state.get("step")}
                    score = facts | key | score | {"dtype": "float32", "device": str(device)}
                    results.add(score)
                    fresh.append(score)
                mine.append(score | {"checkpoint": trained.name})
                error = "" if score["stderr"] is None else f" +- {100 * score['stderr']:.2f}"
                cut = score["requests_cut_on_the_left"]
                note = f", {cut} of {score['requests']} requests cut on the left" if cut else ""
                print(
                    f"{trained.name}  {name}, {shots}-shot  {score['metric']} {100 * score['score']:.2f}{error}{note}",
                    flush=True,
                )
        if said := to_wandb(trained, fresh):
            print(said)
    return mine, problems, parameters


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="eval.run", description="Score models on benchmark tasks.")
    parser.add_argument("models", nargs="+", help="run folders, checkpoint folders, Hugging Face folders, .pt files")
    parser.add_argument("--tasks", nargs="+", default=["paper"], help='"paper" (the nine of the papers) or task names')
    parser.add_argument("--shots", nargs="+", type=int, default=[0], help="worked examples before each question")
    parser.add_argument("--include_path", help="folder with task files of your own")
    parser.add_argument("--data", help="folder with TASK/validation.jsonl and the like, read instead of the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder of results.json and the tables")
    parser.add_argument("--limit", type=int, help="first documents of each task only; for trying things out")
    parser.add_argument("--published", choices=("auto", "none", *SIZES), default="auto", help="published rows to show")
    parser.add_argument("--batch_tokens", type=int, help="tokens a forward pass; default: as many as fit")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokenizer", choices=("byte", "gpt2"), help="default: the model's own")
    parser.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
    args = parser.parse_args(argv)
    try:
        if (
            min(args.shots) < 0
            or 0 in (args.limit, args.batch_tokens)
            or min(args.limit or 1, args.batch_tokens or 1) < 1
        ):
            raise ValueError("--shots must not be negative, --limit and --batch_tokens must be at least 1")
        scores, problems, parameters = evaluate_all(args)
    except KeyboardInterrupt:
        sys.exit(
            f"eval.run: interrupted; the same command continues with the tasks that are left ({args.out}/{RESULTS})"
        )
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"eval.run: {error}")
    if scores:
        size = size_of(parameters) if args.published == "auto" else args.published
        text = markdown(scores, size)
        write_durably(args.out / "table.md", text.encode())
        write_durably(args.out / "table.csv", comma_separated(scores, size).encode())
        print(f"\n{text}\nwritten to {args.out}: {RESULTS}, table.md, table.csv")
    if problems:
        sys.exit(f"eval.run: {len(problems)} of the tasks could not be run; see above")


if __name__ == "__main__":
    main()
