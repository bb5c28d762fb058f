"""Runs and results on one page: python scripts/report.py runs/A runs/B --out report

Writes report/report.md and report/report.png: loss against tokens, training time and gradient evaluations, and losses
at the same token counts beside the published ones. --paired (a file of eval.perplexity --out) adds paired
differences, --scores (results.json of eval.run) adds benchmark scores. --html writes report.html, too: one file
without others, with configs and samples. --on-track RUN only prints whether a run lies
inside the published band at its present token count.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

if __package__ in (None, ""):  # run as a file: python scripts/report.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from config.load import short_count
from eval.perplexity import describe, describe_pair
from eval.report_html import html_page
from eval.table import markdown, markdown_table, published, size_of
from model import GPT, GPTConfig
from runtime.command import Parser, one_line
from runtime.files import write_durably
from runtime.folder import CONFIG
from runtime.logger import METRICS, read_metrics
from runtime.plot import new_figure, save

AXES = {"tokens": "tokens", "train_s": "training time, seconds", "gradients": "gradient evaluations"}
PUBLISHED_BUDGET = 100_000 * 480 * 1024  # tokens of the published runs
TOLERANCE = 0.02  # token counts that differ by less than this fraction count as equal
METHODS = {  # optimizer or mars_type of a config: its name in publications
    "adamw": "AdamW",
    "lion": "Lion",
    "mars-adamw": "MARS-AdamW",
    "mars-lion": "MARS-Lion",
    "mars-shampoo": "MARS-Shampoo",
}


@dataclass
class Run:
    """The settings and validation losses of a run folder."""

    name: str
    size: str | None  # the published size, None for other sizes
    parameters: int
    data: str  # "openwebtext", "fineweb-edu" or the name of the dataset folder
    method: str  # the optimizer's name in publications
    budget: int  # tokens of the whole run, on which its learning rate depends
    points: list[dict]  # tokens, val_loss, train_s, gradients of each evaluation; the last two may be None
    mfu: float | None

    @property
    def tokens(self) -> int:
        """Tokens at the latest evaluation."""
        return self.points[-1]["tokens"]

    def best(self, tokens: float = math.inf) -> float:
        """Lowest validation loss up to a token count."""
        return min(p["val_loss"] for p in self.points if p["tokens"] <= tokens)


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if it is not one or has no evaluation yet."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        records = read_metrics(folder / METRICS)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a run folder (no {Path(error.filename).name})") from None
    except ValueError:
        raise UserError(f"{folder / CONFIG}: not readable as JSON") from None
    try:
        return run_of(folder, config, records)
    except (KeyError, TypeError):
        raise UserError(f"{folder}: not a run of train_gpt.py") from None


def run_of(folder: Path, config: dict, records: list[dict]) -> Run:
    """A run from its config.json and metrics.jsonl. Raises KeyError or TypeError for those of another program."""
    points: list[dict] = []
    latest: dict = {}
    for record in records:  # records of training steps have the time, those of evaluations the validation loss
        latest |= record
        if "val_loss" in record:
            times = {"train_s": latest.get("train_s"), "gradients": latest.get("gradient_evaluations")}
            points.append({"tokens": record["tokens"], "val_loss": record["val_loss"], **times})
    if not points:
        raise UserError(f"{folder}: no evaluation in {METRICS} yet")
    with torch.device("meta"):
        parameters = GPT(GPTConfig(**config["model"])).num_params()
    path = Path(config["data"]["path"]).name.lower()
    known = {r"(openwebtext|owt)(?![a-z])": "openwebtext", r"fineweb.?edu": "fineweb-edu"}
    data = next((name for pattern, name in known.items() if re.match(pattern, path)), path)
    size, method, budget = size_of(parameters), method_of(config), budget_of(config)
    return Run(folder.resolve().name, size, parameters, data, method, budget, points, latest.get("mfu"))


def budget_of(config: dict) -> int:
    """Tokens of a whole run, from its config.json."""
    if config.get("tokens"):
        return config["tokens"]
    return config["steps"] * (config.get("batch_tokens") or config["batch_size"] * config["model"]["block_size"])


def method_of(config: dict) -> str:
    """The name of a run's optimizer in publications."""
    optim, name = config.get("optim") or {}, config.get("optimizer", "")
    if name.startswith("muon"):
        return "Moonlight" if optim.get("scale") == "moonlight" else "Muon"
    if name.startswith("mars_m"):
        method = "MARS-M gamma 0.01" if optim.get("gamma") == 0.01 else "MARS-M"
    else:
        name = optim.get("mars_type", name)
        method = METHODS.get(name, name)
    return method if optim.get("is_approx", True) else f"{method} exact"


def published_loss(run: Run, tokens: float) -> float | None:
    """The published best loss for a run's size, data and method up to a token count; None if there is none.

    Between two published token counts the loss is interpolated on a logarithmic scale.
    """
    wanted = {"size": run.size, "data": run.data, "method": run.method, "kind": "best"}
    known = sorted((p["tokens"], p["loss"]) for p in published()["losses"] if wanted.items() <= p.items())
    for (t0, a), (t1, b) in itertools.pairwise(known):
        if t0 <= tokens <= t1:
            return a + (b - a) * math.log(tokens / t0) / math.log(t1 / t0)
    return next((loss for t, loss in known if abs(tokens - t) <= TOLERANCE * t), None)


def on_track(run: Run) -> str:
    """One line: whether a run's best loss lies inside the published band at its present token count."""
    width, loss, expected = published()["band"]["width"], run.best(), published_loss(run, run.tokens)
    start, count = f"{run.name}: {run.method}, {run.size or f'{run.parameters:,} parameters'}, {run.data}: ", run.tokens
    if expected is None:
        return f"{start}nothing published to compare with at {short_count(count)} tokens (best loss {loss:.3f})"
    difference = loss - expected
    verdict = "inside" if abs(difference) <= width else "above" if difference > 0 else "below"
    note = ""
    if abs(run.budget - PUBLISHED_BUDGET) > TOLERANCE * PUBLISHED_BUDGET:
        theirs = short_count(PUBLISHED_BUDGET)
        note = f"; its budget is {short_count(run.budget)} tokens, the published {theirs}, so learning rates differ"
    losses = f"best loss {loss:.3f}, published {expected:.3f} +- {width}"
    return f"{start}{verdict} the band at {short_count(count)} tokens: {losses}{note}"


def token_counts(runs: list[Run]) -> list[float]:
    """Token counts to compare at: published ones that a run reached, and quarters of what all runs reached."""
    reached, common = max(r.tokens for r in runs), min(r.tokens for r in runs)
    counts = {p["tokens"] for p in published()["losses"] if p["tokens"] <= reached * (1 + TOLERANCE)}
    return sorted(counts | {common * quarter / 4 for quarter in (1, 2, 3, 4)})


def loss_tables(runs: list[Run]) -> str:
    """A markdown table of the runs, and one of their losses at the same token counts."""
    rows = []
    for r in runs:
        last = r.points[-1]
        hours = "" if last["train_s"] is None else f"{last['train_s'] / 3600:.2f}"
        losses = [f"{last['val_loss']:.4f}", f"{r.best():.4f}"]
        mfu = f"{100 * r.mfu:.1f}%" if r.mfu else ""
        rows.append([r.name, r.method, f"{r.parameters:,}", r.data, f"{r.tokens:,}", *losses, hours, mfu])
    header = ["run", "method", "parameters", "data", "tokens", "last loss", "best loss", "hours", "MFU"]
    counts, losses_at_counts = token_counts(runs), []
    for r in runs:
        cells = []
        for count in counts:
            ours = f"{r.best(count):.4f}" if r.points[0]["tokens"] <= count <= r.tokens else ""
            theirs = published_loss(r, count)
            cells.append(ours if theirs is None else f"{ours} ({theirs:.3f})".strip())
        losses_at_counts.append([r.name, *cells])
    return f"""{markdown_table(header, rows)}
## Best validation loss up to a token count

Nats per token. Brackets: the published loss for the same method, size and data.

{markdown_table(["run", *(short_count(round(c)) for c in counts)], losses_at_counts)}"""


def draw(runs: list[Run], path: Path) -> None:
    """Draw loss against tokens, time and gradient evaluations."""
    figure = new_figure(15, 4.5)
    from matplotlib.ticker import EngFormatter

    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        for number, r in enumerate(runs):
            points = [p for p in r.points if p[key] is not None]
            x, y = [p[key] for p in points], [p["val_loss"] for p in points]
            axes.plot(x, y, ".-", color=f"C{number}", label=r.name)
            if key == "tokens":
                counts = [c for c in token_counts(runs) if published_loss(r, c) is not None]
                axes.plot(counts, [published_loss(r, c) for c in counts], "x", color=f"C{number}")
        axes.set(xlabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
    figure.axes[0].set(ylabel="validation loss, nats per token (x: published)")
    figure.axes[0].legend()
    save(figure, path)


def read_results(path: Path | None, *keys: str) -> dict | None:
    """The values of `keys` in a file of eval.run or eval.perplexity; None without a path. UserError if it has none."""
    try:
        if path is None:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in keys}
    except (ValueError, KeyError, TypeError):
        writer = "results.json of eval.run" if "scores" in keys else "file that eval.perplexity --out wrote"
        raise UserError(f"{path}: not a {writer}") from None


def page(runs: list[Run], paired: dict | None, scores: dict | None) -> str:
    """The report in markdown."""
    band = published()["band"]
    parts = [f"# Report\n\n![loss](report.png)\n\n## Runs\n\n{loss_tables(runs)}\n## On track?\n"]
    parts += [f"- {on_track(r)}" for r in runs]
    parts += [f"\nThe band is {band['width']} wide on each side: {band['why']}."]
    if paired:
        parts += [f"\n## The same windows\n\n{paired['text']}, context {paired['context']}:\n"]
        parts += [f"- {describe(m)}" for m in paired["models"]] + [f"- {describe_pair(p)}" for p in paired["paired"]]
    if scores:
        table = markdown(scores["scores"], sorted({r.size for r in runs if r.size}))
        parts += [f"\n## Benchmarks\n\nPercent, with standard errors.\n\n{table}"]
    parts += ["\n## Sources of published numbers\n"]
    parts += [f"- {name}: {source}" for name, source in published()["sources"].items()]
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="report", description="Runs and results on one page.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for report.md and report.png")
    parser.add_argument("--html", action="store_true", help="also report.html: one file, with configs and samples")
    parser.add_argument("--paired", type=Path, help="JSON file of eval.perplexity --out")
    parser.add_argument("--scores", type=Path, help="results.json of eval.run")
    parser.add_argument("--on_track", type=Path, metavar="RUN", help="only print whether this run is inside the band")
    args = parser.parse_args(argv)
    with one_line("report"):
        if args.on_track:
            print(on_track(read_run(args.on_track)))
            return
        if not args.runs:
            raise UserError("name at least one run folder")
        runs = [read_run(folder) for folder in args.runs]
        paired = read_results(args.paired, "text", "context", "models", "paired")
        scores = read_results(args.scores, "scores")
        args.out.mkdir(parents=True, exist_ok=True)
        draw(runs, args.out / "report.png")
        text, files = page(runs, paired, scores), ["report.md", "report.png"]
        write_durably(args.out / "report.md", text.encode())
        if args.html:
            write_durably(args.out / "report.html", html_page(text, args.out / "report.png", args.runs).encode())
            files.append("report.html")
        print(f"{args.out}: {', '.join(files)}")


if __name__ == "__main__":
    main()
