"""Runs and results on one page: python scripts/report.py runs/A runs/B --out report

Writes report/report.md and report/report.png: loss against tokens, training time and gradient evaluations, and losses
at the same token counts beside the published ones. The page begins with the settings that differ. Losses stand side by
side if they were measured on the same validation data. --paired (a file of eval.perplexity --out) adds paired
differences, --scores (results.json of eval.run) adds benchmark scores. --html also writes report.html: a single
file with configs and samples. --on-track RUN only prints whether a run lies inside the published band at
its present token count.
"""

import itertools
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: python scripts/report.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from eval.comparison import bytes_per_token, comparable, different_settings, groups_of, tokenizer_name
from eval.expected import PAGE
from eval.perplexity import describe, describe_pair
from eval.report_html import html_page
from eval.table import markdown, markdown_table, published, size_of
from model import GPT, GPTConfig
from runtime.command import Parser, one_line, short_count
from runtime.errors import UserError
from runtime.files import read_json, write_durably
from training.folder import CONFIG
from training.logger import METRICS, read_metrics
from training.plot import new_figure, save

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

    folder: Path
    name: str
    config: dict  # content of config.json
    last: dict  # record of the latest evaluation
    size: str | None  # the published size, None for other sizes
    parameters: int
    data: str  # "openwebtext", "fineweb-edu" or the name of the dataset folder
    method: str  # the optimizer's name in publications
    budget: int  # tokens of the whole run, on which its learning rate depends
    points: list[dict]  # tokens, val_loss, train_s, gradients of each evaluation that is comparable with the latest
    mfu: float | None
    tokenizer: str
    bits: float | None  # bits per byte of text for one nat per token; None if the bytes are not known
    scale: float = 1.0  # what losses in nats per token are multiplied by on the page
    group: int = 1  # runs of one group were evaluated on the same validation data

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
        config = read_json(folder / CONFIG)
        records = read_metrics(folder / METRICS)
    except OSError as error:
        name = Path(error.filename or "").name
        reason = f"no {name}" if not (folder / name).exists() else error.strerror
        raise UserError(f"{folder}: not a run folder ({reason})") from None
    try:
        return run_of(folder, config, records)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder}: not a run of train_gpt.py") from None


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs among some folders. The others are named in one line; UserError if no run remains."""
    runs, skipped = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            skipped.append(str(error))
    if not runs:
        raise UserError("; ".join(skipped) or "name at least one run folder")
    if skipped:
        print(f"report: skipped {len(skipped)} of {len(folders)}: {'; '.join(skipped)}", file=sys.stderr)
    uses = Counter(run.name for run in runs)
    for run in runs:
        run.name = str(run.folder) if uses[run.name] > 1 else run.name
    for number, group in enumerate(groups_of(runs, [(run.config, run.last) for run in runs]), 1):
        for run in group:
            run.group = number
    if len({run.tokenizer for run in runs}) > 1 and all(run.bits for run in runs):
        for run in runs:
            run.scale = run.bits or 1.0
    return runs


def run_of(folder: Path, config: dict, records: list[dict]) -> Run:
    """A run from its config.json and metrics.jsonl. Raises KeyError or TypeError for those of another program."""
    points: list[dict] = []
    latest: dict = {}
    evaluations = [record for record in records if "val_loss" in record]
    if not evaluations:
        raise UserError(f"{folder}: no evaluation in {METRICS} yet")
    last = evaluations[-1]
    for record in records:  # records of training steps have the time, those of evaluations the validation loss
        latest |= record
        if "val_loss" in record and comparable((config, record), (config, last)):
            found = {"train_s": latest.get("train_s"), "gradients": latest.get("gradient_evaluations")}
            times = {key: None if value is None else float(value) for key, value in found.items()}
            points.append({"tokens": int(record["tokens"]), "val_loss": float(record["val_loss"]), **times})
    shape = GPTConfig(**config["model"])
    if shape.errors():
        raise ValueError(shape.errors())
    with torch.device("meta"):
        parameters = GPT(shape).num_params()
    path = Path(config["data"]["path"]).name.lower()
    known = {r"(openwebtext|owt)(?![a-z])": "openwebtext", r"fineweb.?edu": "fineweb-edu"}
    data = next((name for pattern, name in known.items() if re.match(pattern, path)), path)
    size, mfu = bytes_per_token(last), latest.get("mfu")
    return Run(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        last=last,
        size=size_of(parameters),
        parameters=parameters,
        data=data,
        method=method_of(config),
        budget=int(budget_of(config)),
        points=points,
        mfu=None if mfu is None else float(mfu),
        tokenizer=tokenizer_name(config, last),
        bits=1 / size / math.log(2) if size else None,
    )


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

    The published runs have the GPT-2 tokenizer. Between two published token counts the loss is interpolated on a
    logarithmic scale.
    """
    wanted = {"size": run.size, "data": run.data, "method": run.method, "kind": "best"}
    if run.tokenizer != "gpt2":
        return None
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


def unit(runs: list[Run]) -> str:
    """Of the losses on the page."""
    return "nats per token" if all(run.scale == 1.0 for run in runs) else "bits per byte"


def groups(runs: list[Run]) -> dict[int, list[Run]]:
    """The runs by group."""
    return {number: [run for run in runs if run.group == number] for number in sorted({run.group for run in runs})}


def top(runs: list[Run]) -> str:
    """Whether the losses may be compared, and a table of the settings that differ."""
    if len(runs) == 1:
        return ""
    lines, found, tokenizers = [], groups(runs), {run.tokenizer for run in runs}
    if len(found) > len(tokenizers):
        names = "; ".join(f"{number}: {', '.join(run.name for run in group)}" for number, group in found.items())
        lines.append(f"**Warning: validation data differ.** Compare losses inside a group only. Groups: {names}.\n")
    if len(tokenizers) > 1:
        known = "Losses are in bits per byte. Compare them only if the validation text is the same."
        unknown = "Losses per token cannot be compared, and not all runs know the bytes of their validation text."
        line = f"**Warning: tokenizers differ, and so the validation data do.** {unknown}\n"
        lines.append(line if unit(runs) == "nats per token" else line.replace(unknown, known))
    rows = different_settings([run.config for run in runs], [run.last for run in runs])
    table = [["setting", *(run.name for run in runs)], *rows]
    if len(runs) > max(6, len(rows)):  # the page would be wide
        table = [["run", *table[0][1:]], *table[1:]]
        table = [list(column) for column in zip(*table, strict=True)]
    settings = markdown_table(table[0], table[1:]) if rows else "None.\n"
    return "\n".join([*lines, "## Settings that differ\n", settings, ""])


def loss_tables(runs: list[Run]) -> str:
    """A markdown table of the runs, and one for each group of their losses at the same token counts."""
    rows, found = [], groups(runs)
    for r in runs:
        last = r.points[-1]
        hours = "" if last["train_s"] is None else f"{last['train_s'] / 3600:.2f}"
        losses = [f"{r.scale * last['val_loss']:.4f}", f"{r.scale * r.best():.4f}"]
        mfu = f"{100 * r.mfu:.1f}%" if r.mfu else ""
        group = [str(r.group)] if len(found) > 1 else []
        rows.append([r.name, r.method, f"{r.parameters:,}", r.data, *group, f"{r.tokens:,}", *losses, hours, mfu])
    validation = ["group"] if len(found) > 1 else []
    header = ["run", "method", "parameters", "data", *validation, "tokens", "last loss", "best loss", "hours", "MFU"]
    name = unit(runs)
    text = f"{markdown_table(header, rows)}\n## Best validation loss up to a token count\n\n"
    text += f"{name.capitalize()}. Brackets: the published loss for the same method, size and data.\n\n"
    if name == "bits per byte" or len(found) == 1:
        return text + losses_at_counts(runs)
    return text + "\n".join(f"Group {number}:\n\n{losses_at_counts(group)}" for number, group in found.items())


def losses_at_counts(runs: list[Run]) -> str:
    """A markdown table of the best losses of comparable runs up to several token counts."""
    counts, rows = token_counts(runs), []
    for r in runs:
        cells = []
        for count in counts:
            ours = f"{r.scale * r.best(count):.4f}" if r.points[0]["tokens"] <= count <= r.tokens else ""
            theirs = published_loss(r, count)
            cells.append(ours if theirs is None else f"{ours} ({r.scale * theirs:.3f})".strip())
        rows.append([r.name, *cells])
    return markdown_table(["run", *(short_count(round(c)) for c in counts)], rows)


def draw(runs: list[Run], path: Path) -> None:
    """Draw loss against tokens, time and gradient evaluations."""
    figure = new_figure(15, 4.5)
    from matplotlib.ticker import EngFormatter

    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        for number, r in enumerate(runs):
            points = [p for p in r.points if p[key] is not None]
            x, y = [p[key] for p in points], [r.scale * p["val_loss"] for p in points]
            axes.plot(x, y, ".-", color=f"C{number}", label=r.name)
            if key == "tokens":
                counts = [c for c in token_counts(runs) if published_loss(r, c) is not None]
                losses = [r.scale * (published_loss(r, c) or math.nan) for c in counts]
                axes.plot(counts, losses, "x", color=f"C{number}")
        axes.set(xlabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
    figure.axes[0].set(ylabel=f"validation loss, {unit(runs)} (x: published)")
    figure.axes[0].legend()
    save(figure, path)


def paired_lines(path: Path) -> list[str]:
    """The losses and differences in a file of eval.perplexity --out. UserError for another file."""
    what = "a file that eval.perplexity --out wrote"
    content = read_json(path, what)
    try:
        lines = [f"- {describe(m)}" for m in content["models"]] + [f"- {describe_pair(p)}" for p in content["paired"]]
        return [f"\n## The same windows\n\n{content['text']}, context {content['context']}:\n", *lines]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{path}: not {what}") from None


def score_lines(path: Path, runs: list[Run]) -> list[str]:
    """The table of a results.json of eval.run. UserError for another file."""
    what = "a results.json of eval.run"
    content = read_json(path, what)
    try:
        table = markdown(content["scores"], sorted({r.size for r in runs if r.size}))
        return [f"\n## Benchmarks\n\nPercent, with standard errors.\n\n{table}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not {what}") from None


def page(runs: list[Run], more: list[str]) -> str:
    """The report in markdown. more: parts after those of the runs."""
    band = published()["band"]
    parts = [f"# Report\n\n{top(runs)}![loss](report.png)\n\n## Runs\n\n{loss_tables(runs)}\n## On track?\n"]
    parts += [f"- {on_track(r)}" for r in runs]
    parts += [f"\nThe band is {band['width']} wide on each side: {band['why']}.", *more]
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
            print(f"{on_track(read_run(args.on_track))}\npublished losses by size, optimizer and tokens: {PAGE}")
            return
        runs = read_runs(args.runs)
        more = paired_lines(args.paired) if args.paired else []
        more += score_lines(args.scores, runs) if args.scores else []
        args.out.mkdir(parents=True, exist_ok=True)
        draw(runs, args.out / "report.png")
        text, files = page(runs, more), ["report.md", "report.png"]
        write_durably(args.out / "report.md", text.encode())
        if args.html:
            folders = [run.folder for run in runs]
            write_durably(args.out / "report.html", html_page(text, args.out / "report.png", folders).encode())
            files.append("report.html")
        print(f"{args.out}: {', '.join(files)}")


if __name__ == "__main__":
    main()
