"""Runs and results on one page: python scripts/report.py runs/A runs/B --out report

Writes report/report.md and report/report.png: loss against tokens, training time and gradient evaluations; losses at
matching token counts beside the published ones; paired differences (--paired, from eval.perplexity --out);
benchmark scores (--scores, results.json of eval.run). --on-track RUN only says whether a run lies inside the
published band at its present token count.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: python scripts/report.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from config.load import short_count
from eval.perplexity import describe, describe_pair
from eval.table import markdown, published, size_of
from model import GPT, GPTConfig
from runtime.files import write_durably
from runtime.folder import CONFIG
from runtime.logger import METRICS, read_metrics

AXES = {"tokens": "tokens", "train_s": "training time, seconds", "gradients": "gradient evaluations"}
PUBLISHED_BUDGET = 100_000 * 480 * 1024  # tokens of the published runs
SAME_COUNT = 0.02  # a published number without neighbours holds this far from its token count, relatively


@dataclass
class Run:
    """A run folder: what it trained and its validation losses."""

    name: str
    size: str | None  # published size, None for another one
    parameters: int
    data: str  # "openwebtext", "fineweb-edu" or the dataset folder's name
    method: str  # the name published results go by
    budget: int  # tokens the whole run is to take, which its learning rate follows
    points: list[dict]  # tokens, val_loss, train_s, gradients of each evaluation; the last two may be None
    mfu: float | None

    def best(self, tokens: float = math.inf) -> float:
        """Lowest validation loss up to a token count."""
        return min(p["val_loss"] for p in self.points if p["tokens"] <= tokens)


def read_run(folder: Path) -> Run:
    """A run folder's settings and validation losses. Raises ValueError if there is none or no evaluation yet."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        records = read_metrics(folder / METRICS)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not a run folder (no {Path(error.filename).name})") from None
    except ValueError:
        raise ValueError(f"{folder / CONFIG}: not readable as JSON") from None
    with torch.device("meta"):
        parameters = GPT(GPTConfig(**config["model"])).num_params()
    path = Path(config["data"]["path"]).name.lower()
    known = {"openwebtext": "openwebtext", "owt": "openwebtext", "fineweb": "fineweb-edu"}
    data = next((name for word, name in known.items() if word in path), path)
    points, seconds, gradients = [], None, None
    for r in records:
        seconds, gradients = r.get("train_s", seconds), r.get("gradient_evaluations", gradients)
        if "val_loss" in r:
            points.append(
                {"tokens": r["tokens"], "val_loss": r["val_loss"], "train_s": seconds, "gradients": gradients}
            )
    if not points:
        raise ValueError(f"{folder}: no evaluation in {METRICS} yet")
    mfu = next((r["mfu"] for r in reversed(records) if "mfu" in r), None)
    name, size = folder.resolve().name, size_of(parameters)
    return Run(name, size, parameters, data, method_of(config), budget_of(config), points, mfu)


def budget_of(config: dict) -> int:
    """Tokens of a whole run, from its config.json."""
    if config.get("tokens"):
        return config["tokens"]
    return config["steps"] * (config.get("batch_tokens") or config["batch_size"] * config["model"]["block_size"])


def method_of(config: dict) -> str:
    """The name under which a run's optimizer appears among published results."""
    optim, name = config.get("optim") or {}, config.get("optimizer", "")
    exact = "" if optim.get("is_approx", True) else " exact"
    if "mars_type" in optim:
        return {"mars-adamw": "MARS-AdamW", "mars-lion": "MARS-Lion", "mars-shampoo": "MARS-Shampoo"}[
            optim["mars_type"]
        ] + exact
    if name.startswith("mars_m"):
        return ("MARS-M gamma 0.01" if optim.get("gamma") == 0.01 else "MARS-M") + exact
    if name.startswith("muon"):
        return "Moonlight" if optim.get("scale") == "moonlight" else "Muon"
    return {"adamw": "AdamW", "lion": "Lion"}.get(name, name)


def published_loss(run: Run, tokens: float) -> float | None:
    """The published best loss of a run's size, data and method up to a token count, log-linear between two counts."""
    known = [
        (p["tokens"], p["loss"])
        for p in published()["losses"]
        if (p["size"], p["data"], p["method"], p["kind"]) == (run.size, run.data, run.method, "best")
    ]
    known.sort()
    for (t0, a), (t1, b) in itertools.pairwise(known):
        if t0 <= tokens <= t1:
            return a + (b - a) * math.log(tokens / t0) / math.log(t1 / t0)
    return next((loss for t, loss in known if abs(tokens - t) <= SAME_COUNT * t), None)


def on_track(run: Run) -> str:
    """One line: whether a run's best loss lies inside the published band at its present token count."""
    tokens, width = run.points[-1]["tokens"], published()["band"]["width"]
    loss, expected = run.best(), published_loss(run, tokens)
    what = f"{run.name}: {run.method}, {run.size or f'{run.parameters:,} parameters'}, {run.data}"
    if expected is None:
        return f"{what}: nothing published to compare with at {short_count(tokens)} tokens (best loss {loss:.3f})"
    difference = loss - expected
    verdict = "inside" if abs(difference) <= width else "above" if difference > 0 else "below"
    note = ""
    if abs(run.budget - PUBLISHED_BUDGET) > SAME_COUNT * PUBLISHED_BUDGET:
        theirs = short_count(PUBLISHED_BUDGET)
        note = f"; its budget is {short_count(run.budget)} tokens, the published {theirs}, so learning rates differ"
    return (
        f"{what}: {verdict} the band at {short_count(tokens)} tokens: best loss {loss:.3f}, "
        f"published {expected:.3f} +- {width}{note}"
    )


def token_counts(runs: list[Run]) -> list[float]:
    """Token counts to compare at: published ones that a run reached, and quarters of what all runs reached."""
    reached = max(r.points[-1]["tokens"] for r in runs)
    common = min(r.points[-1]["tokens"] for r in runs)
    counts = {p["tokens"] for p in published()["losses"] if p["tokens"] <= reached * (1 + SAME_COUNT)}
    return sorted(counts | {common * quarter / 4 for quarter in (1, 2, 3, 4)})


def loss_tables(runs: list[Run]) -> list[str]:
    """Markdown lines: what each run is, then losses at matching token counts with the published ones in brackets."""
    lines = ["| run | method | parameters | data | tokens | last loss | best loss | hours | MFU |"]
    lines += ["|---|---|---:|---|---:|---:|---:|---:|---:|"]
    for r in runs:
        last = r.points[-1]
        hours = f"{last['train_s'] / 3600:.2f}" if last["train_s"] is not None else ""
        mfu = f"{100 * r.mfu:.1f}%" if r.mfu else ""
        lines.append(
            f"| {r.name} | {r.method} | {r.parameters:,} | {r.data} | {last['tokens']:,} | {last['val_loss']:.4f} | "
            f"{r.best():.4f} | {hours} | {mfu} |"
        )
    counts = token_counts(runs)
    lines += ["", "## Best validation loss up to a token count", ""]
    lines += ["Nats per token; in brackets what was published for the same method, size and data.", ""]
    lines += ["| run | " + " | ".join(short_count(round(c)) for c in counts) + " |", "|---|" + "---:|" * len(counts)]
    for r in runs:
        cells = []
        for count in counts:
            ours = f"{r.best(count):.4f}" if r.points[0]["tokens"] <= count <= r.points[-1]["tokens"] else ""
            theirs = published_loss(r, count)
            cells.append(" ".join([ours, f"({theirs:.3f})"]).strip() if theirs is not None else ours)
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Loss against tokens, time and gradient evaluations. Raises ImportError, with the remedy, without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise ImportError("drawing curves needs: pip install matplotlib") from None
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        for number, r in enumerate(runs):
            points = [(p[key], p["val_loss"]) for p in r.points if p[key] is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), ".-", color=f"C{number}", label=r.name)
            if key == "tokens":
                counts = [c for c in token_counts(runs) if published_loss(r, c) is not None]
                axes.plot(counts, [published_loss(r, c) for c in counts], "x", color=f"C{number}")
        axes.set(xlabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
    figure.axes[0].set(ylabel="validation loss, nats per token (x: published)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def read_results(path: Path, *keys: str) -> dict:
    """A JSON file that holds `keys`; ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        [content[key] for key in keys]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: no {' and '.join(keys)} in it; give what eval.run or eval.perplexity wrote"
        ) from None
    return content


def page(runs: list[Run], paired: dict | None, scores: dict | None) -> str:
    """The report in markdown."""
    lines = ["# Report", "", "![loss](report.png)", "", "## Runs", "", *loss_tables(runs), "", "## On track?", ""]
    lines += [f"- {on_track(r)}" for r in runs]
    lines += ["", f"The band is {published()['band']['width']} wide on each side: {published()['band']['why']}."]
    if paired:
        lines += ["", "## The same windows", "", f"{paired['text']}, context {paired['context']}:", ""]
        lines += [f"- {describe(m)}" for m in paired["models"]] + [f"- {describe_pair(p)}" for p in paired["paired"]]
    if scores:
        sizes = sorted({r.size for r in runs if r.size})
        lines += ["", "## Benchmarks", "", "Percent, with standard errors.", "", markdown(scores["scores"], sizes)]
    lines += ["", "## Sources of published numbers", ""]
    lines += [f"- {name}: {what}" for name, what in published()["sources"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report", description="Runs and results on one page.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for report.md and report.png")
    parser.add_argument("--paired", type=Path, help="JSON file of eval.perplexity --out")
    parser.add_argument("--scores", type=Path, help="results.json of eval.run")
    parser.add_argument("--on-track", type=Path, metavar="RUN", help="only say whether this run is inside the band")
    args = parser.parse_args(argv)
    try:
        if args.on_track:
            print(on_track(read_run(args.on_track)))
            return
        if not args.runs:
            raise ValueError("name at least one run folder")
        runs = [read_run(folder) for folder in args.runs]
        paired = read_results(args.paired, "text", "context", "models", "paired") if args.paired else None
        scores = read_results(args.scores, "scores") if args.scores else None
        args.out.mkdir(parents=True, exist_ok=True)
        draw(runs, args.out / "report.png")
        write_durably(args.out / "report.md", page(runs, paired, scores).encode())
        print(f"{args.out}: report.md, report.png")
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
