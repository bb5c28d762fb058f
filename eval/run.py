"""Benchmark scores by lm-eval: python -m eval.run runs/NAME HF_FOLDER ckpt.pt --tasks paper --shots 0 5

One code path scores run folders, checkpoints, Hugging Face GPT-2 folders, and .pt files of nanoGPT or MARS. Under
torchrun all ranks share the work. Each score is written to results.json at once, so the same command continues an
interrupted evaluation.
"""

import argparse
import hashlib
import io
import itertools
import sys
import time
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import torch

from eval.command import model_parser
from eval.scoring import Scorer, harness_model
from eval.table import SIZES, cells_of, comma_separated, markdown, size_of
from eval.tasks import Tasks, metric_of
from runtime.command import at_least, first_line, one_line
from runtime.distributed import World, start_world
from runtime.errors import UserError
from runtime.files import lock_of, read_json, write_durably, write_json
from training.logger import WANDB_ID
from weights import Trained, open_trained

RESULTS = "results.json"


def read_records(path: Path) -> list[dict]:
    """The records of a results.json, one for each model, task and number of shots; none if there is no file.

    Raises UserError for a file without such records, so that it is not overwritten.
    """
    what = "a results file; repair it or choose another --out"
    content = read_json(path, what) if path.exists() else {"scores": []}
    try:
        records = [dict(score) for score in content["scores"]]
        markdown(records, [])  # the tables need what the records must have
        return records
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not {what}") from None


def find(records: list[dict], key: dict) -> dict | None:
    """The first record with these values; a value that an older record lacks is None."""
    return next((r for r in records if all(r.get(k) == v for k, v in key.items())), None)


def add_record(path: Path, record: dict, key: dict) -> None:
    """Add a record to a results.json that other evaluations may write, too. The first record of a key stays."""
    with lock_of(path):
        records = read_records(path)
        if find(records, key) is None:
            write_json(path, {"format": 1, "scores": [*records, record]})


def score_task(trained: Trained, scorer: Scorer, tasks: Tasks, name: str, shots: int, limit: int | None) -> dict:
    """Score one model on one task. Every rank must call it; they share the work. UserError if its data is missing."""
    from lm_eval.evaluator import evaluate

    loaded = problem = None
    try:
        loaded = tasks.load(name, shots)
    except ValueError as error:
        problem = str(error)
    if problem := next((p for p in scorer.world.gather(problem) if p), None):
        raise UserError(problem)
    assert trained.tokenizer is not None
    truncated, scored, start = scorer.truncated, scorer.scored, time.perf_counter()
    with nullcontext() if scorer.world.is_main else redirect_stderr(io.StringIO()):  # one progress bar in all
        try:
            results = evaluate(harness_model(scorer, trained.tokenizer), loaded, limit=limit, log_samples=False)
        except ValueError as error:  # fewer examples than shots, for example
            raise UserError(f"task {name}, {shots}-shot: lm-eval cannot run it ({first_line(error)})") from None
    numbers = {**results["results"], **results.get("groups", {})}[name]
    metric = metric_of(name, numbers)
    measure, _, filtered = metric.partition(",")
    stderr = numbers.get(f"{measure}_stderr,{filtered or 'none'}")
    return {
        "score": float(numbers[f"{measure},{filtered or 'none'}"]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "metric": metric,
        "all_metrics": {k: v for k, v in numbers.items() if isinstance(v, int | float)},
        "documents": sum(c["effective"] for c in results["n-samples"].values()),
        "requests": scorer.scored - scored,
        "requests_cut_on_the_left": scorer.truncated - truncated,
        "seconds": round(time.perf_counter() - start, 1),
    }


def to_wandb(trained: Trained, scores: list[dict], mode: str) -> str | None:
    """Write scores into the summary of a run's wandb page; returns a message, or None if there is no page.

    mode: "auto" for runs that logged online; "on" also for runs that logged offline and were synced since.
    """
    folder = trained.run_folder
    if mode == "off" or not scores or folder is None or not (folder / WANDB_ID).exists():
        return None
    log, run_id = trained.state["config"].get("log", {}), (folder / WANDB_ID).read_text()
    if mode == "auto" and log.get("wandb") != "online":
        return f"wandb run {run_id} is offline: `wandb sync` it, then the same command with --wandb on adds the scores"
    try:
        import wandb

        run = wandb.init(id=run_id, resume="must", project=log.get("project"), dir=str(folder))
        for s in scores:
            run.summary[f"eval/{s['task']}/{s['shots']}-shot/{s['metric']}"] = s["score"]
        run.finish()
    except Exception as error:  # the scores are in the file; a failing service must not stop the next model
        return f"wandb did not take the scores ({error}); {RESULTS} has them, the same command tries again"
    return f"scores written to wandb run {run_id}"


def fingerprint(out: Path, *folders: str | None) -> str | None:
    """A hash of the names, sizes and times of the files in folders, by which changed tasks are noticed.

    The files that an evaluation writes itself do not count: those in `out`, and Python's caches.
    """
    files = sorted(p for folder in folders if folder for p in Path(folder).rglob("*") if p.is_file())
    inputs = [p for p in files if "__pycache__" not in p.parts and out.resolve() not in p.resolve().parents]
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in inputs]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else None


def score_model(
    args: argparse.Namespace, trained: Trained, tasks: Tasks, world: World
) -> tuple[list[dict], dict[str, str]]:
    """Score one model on every task that results.json does not have yet; returns the records of these tasks.

    Rank 0 adds each new record to results.json at once. A task whose data cannot be read is left out; the second value
    names those tasks, with the reason.
    """
    scorer, scores, failed = Scorer(trained.model, args.batch_tokens, world), [], {}
    facts = {"checkpoint": trained.name, "path": str(trained.path), "step": trained.state.get("step")}
    facts |= {"dtype": "float32", "device": str(world.device)}
    # rank 0 decides: file times differ between machines, and all ranks must score the same tasks
    files = world.from_main(fingerprint(args.out, args.include_path, args.task_data))
    for shots, name in itertools.product(args.shots, tasks.names):
        key = {"sha256": trained.sha256, "task": name, "shots": shots, "limit": args.limit}
        key |= {"harness": tasks.version, "tokenizer": trained.facts["name"], "data": args.task_data}
        key |= {"prefix_token": trained.facts["eot"], "files": files}
        known = world.from_main(read_records(args.out / RESULTS) if world.is_main else [])  # others may write, too
        score = find(known, key)
        if score is None:
            try:
                score = facts | key | score_task(trained, scorer, tasks, name, shots, args.limit)
            except ValueError as error:
                failed[name] = str(error)
                continue
            if world.is_main:
                add_record(args.out / RESULTS, score, key)
        scores.append(score | {"checkpoint": trained.name})
        if world.is_main:
            print(describe(scores[-1]), flush=True)
    if world.is_main and (message := to_wandb(trained, scores, args.wandb)):
        print(message)
    return scores, failed


def score_all(args: argparse.Namespace, world: World) -> int:
    """Score every model on every task and write the tables; returns the number of tasks that could not be run."""
    tasks = Tasks(args.tasks, args.include_path, args.task_data)
    args.out.mkdir(parents=True, exist_ok=True)
    read_records(args.out / RESULTS)  # another file of that name is an error before the work
    scores: list[dict] = []
    failed: dict[str, str] = {}
    sizes = set()
    for path in args.models:
        trained = open_trained(path, world.device, args.tokenizer, args.ranks, args.eot)
        if any(s["checkpoint"] == trained.name for s in scores):
            trained.name = path
        sizes.add(size_of(trained.model.num_params()))
        found, missing = score_model(args, trained, tasks, world)
        scores, failed = scores + found, failed | missing
    if scores and world.is_main:
        shown = [s for s in SIZES if args.published == s or (args.published == "auto" and s in sizes)]
        text = write_tables(args.out, scores, shown)
        print(f"\n{text}\nwritten to {args.out}: {RESULTS}, table.md, table.csv")
    if world.is_main:
        print("".join(f"eval.run: {reason}\n" for reason in failed.values()), end="", file=sys.stderr)
    return len(failed)


def write_tables(out: Path, scores: list[dict], sizes: list[str]) -> str:
    """Write table.md, which is returned, and table.csv. sizes: whose published rows they show."""
    with lock_of(out / RESULTS):
        scores = with_earlier(scores, read_records(out / RESULTS))
        text = markdown(scores, sizes)
        write_durably(out / "table.md", text.encode())
        write_durably(out / "table.csv", comma_separated(scores, sizes).encode())
    return text


def with_earlier(scores: list[dict], records: list[dict]) -> list[dict]:
    """The scores of this command and older ones of the same models; for equal keys, the newest record counts."""

    def model(s: dict) -> tuple:
        return s["sha256"], s.get("tokenizer"), s.get("prefix_token")

    found = {(s["checkpoint"], *model(s), s["task"], s["shots"], s.get("limit")): s for s in scores}
    for name, *asked in dict.fromkeys((s["checkpoint"], *model(s)) for s in scores):
        for s in reversed(records):
            if s.get("sha256") == asked[0] and list(model(s)) == asked:
                place = (name, *asked, s["task"], s["shots"], s.get("limit"))
                found.setdefault(place, s | {"checkpoint": name})
    return list(found.values())


def describe(score: dict) -> str:
    """A record in one line."""
    cells = cells_of(score).items()
    numbers = [f"{metric} {value:.2f}" + ("" if e is None else f" +- {e:.2f}") for metric, (value, e) in cells]
    cut = score["requests_cut_on_the_left"]
    note = f", {cut} of {score['requests']} requests cut on the left" if cut else ""
    return f"{score['checkpoint']}  {score['task']}, {score['shots']}-shot  {', '.join(numbers)}{note}"


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.run", "Score models on benchmark tasks.")
    parser.add_argument("models", nargs="+", help="runs, checkpoints, Hugging Face folders, .pt files, gpt2")
    parser.add_argument("--tasks", nargs="+", default=["paper"], help='"paper" (the nine of the papers) or task names')
    parser.add_argument("--shots", nargs="+", type=at_least(0), default=[0], help="examples before each question")
    parser.add_argument("--include_path", help="folder with your own task files")
    parser.add_argument("--task_data", "--data", help="folder of TASK/SPLIT.jsonl, read instead of the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="folder of results.json and the tables")
    parser.add_argument("--limit", type=at_least(1), help="score only the first documents of a task, for a quick try")
    parser.add_argument("--published", choices=("auto", "none", *SIZES), default="auto", help="published rows to show")
    parser.add_argument("--batch_tokens", type=at_least(1), help="tokens per forward pass; halved if memory is short")
    parser.add_argument("--wandb", choices=("auto", "on", "off"), default="auto", help="write to the run's wandb page")
    args = parser.parse_args(argv)
    left = f"interrupted; the same command continues with the remaining tasks ({args.out}/{RESULTS})"
    with one_line("eval.run", left), start_world(args.device) as world:
        torch.set_float32_matmul_precision("highest")
        failed = score_all(args, world)
    if failed:
        sys.exit(f"eval.run: {failed} of the tasks could not be run; see above")


if __name__ == "__main__":
    main()
