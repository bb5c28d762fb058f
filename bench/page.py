"""One page of what was measured on a GPU: python -m bench.page --folder results

Reads the newest results of bench.facts, bench.gpu and bench.correctness, the runs and the sweep `first_gpu` in a
folder, for example of an unpacked archive of scripts/gpu_quarter_hour.sh. Writes gpu.md beside them, and fills the
table of the README and the columns "measured" of docs/performance.md.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bench.gpu import BEST
from bench.prediction import MEMORY, PER_WIDTH, predicted
from bench.report import RESULTS, ROOT
from bench.timing import SIZES
from runtime.command import Parser, one_line
from runtime.errors import UserError
from runtime.files import write_durably
from runtime.markdown import table_of_records
from training.logger import METRICS, read_metrics

BEGIN, END = "<!-- speed: written by python -m bench.page -->", "<!-- end of speed -->"
NOT_MEASURED = "not measured"


def results(folder: Path, bench: str, any_hardware: bool) -> Iterator[tuple[dict, list[dict]]]:
    """Facts and rows of the result files of a bench, the oldest first; only those of a GPU, unless any_hardware."""
    for path in sorted(folder.glob(f"{bench}_*.jsonl"), key=lambda p: (p.stem[-10:], p.stat().st_mtime)):
        facts, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if any_hardware or not facts["hardware"].startswith(("cpu", "null GPU")):
            yield facts, rows


def speeds(folder: Path, any_hardware: bool) -> dict[tuple[str, str], dict]:
    """The newest numbers by size and side, each with the facts of its file."""
    newest: dict[tuple[str, str], dict] = {}
    for facts, rows in results(folder, "gpu", any_hardware):
        size = facts["bench"].split("_")[1]
        newest |= {(size, row["side"]): row | facts for row in rows if "tokens_per_s" in row}
    return newest


def failures(folder: Path, any_hardware: bool) -> dict[tuple[str, str], dict]:
    """The newest row without a speed by size and side; its note says why."""
    rows = [row for _, rows in results(folder, "gpu", any_hardware) for row in rows]
    return {(row["size"], row["side"]): row for row in rows if row.get("note") and "tokens_per_s" not in row}


def ratio(best: dict, other: dict | None) -> str:
    """The speed of a side against another one on the same hardware on the same day."""
    together = other and all(best[key] == other[key] for key in ("hardware", "torch", "date"))
    return f"{best['tokens_per_s'] / other['tokens_per_s']:.2f}x" if other and together else NOT_MEASURED


def speed_table(found: dict[tuple[str, str], dict]) -> str:
    """The speeds of the side best in markdown, a row for each size. Where it failed, with flash attention."""
    rows = []
    for size in SIZES:
        row = {"size": size, "tokens/s": NOT_MEASURED}
        if numbers := found.get((size, "best")) or found.get((size, "best_flash")):
            row |= {"tokens/s": f"{numbers['tokens_per_s']:,.0f}", "MFU": _percent(numbers["mfu"])}
            row |= {"attention": numbers["attention"], "micro-batch": numbers["micro_batch"]}
            row |= {"memory": f"{numbers['memory_gb']:.1f} GB"}
            row |= {"MARS-M's part of a step": _percent(numbers["optimizer_share"])}
            row |= {"against nanoGPT's way": ratio(numbers, found.get((size, "nanogpt")))}
            row |= {key: numbers[key] for key in ("hardware", "torch", "date")}
        rows.append(row)
    return table_of_records(rows)


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"


def prediction_table(found: dict[tuple[str, str], dict]) -> str:
    """Predicted thousands of tokens/s and MFU of each side and size on each card, beside what was measured."""
    rows = []
    for side in PER_WIDTH:
        for size in SIZES:
            row = {"side": side, "size": size}
            for card in MEMORY:
                expected, measured = predicted(size, side, card), found.get((size, side))
                row[f"{card}, predicted"] = _speed(expected)
                is_card = measured and card in measured["hardware"]
                row[f"{card}, measured"] = _speed(measured) if measured and is_card else NOT_MEASURED
            rows.append(row)
    return table_of_records(rows)


def _speed(numbers: dict) -> str:
    return f"{numbers['tokens_per_s'] / 1e3:.1f} ({_percent(numbers['mfu'])})"


def checks(folder: Path, any_hardware: bool) -> list[dict]:
    """The newest row of each check of bench.correctness."""
    files = results(folder, "correctness", any_hardware)
    newest = {row["what"]: row for _, rows in files for row in rows if "result" in row}
    return [{key: row[key] for key in ("what", "bound", "found", "result")} for row in newest.values()]


def trained(folder: Path) -> list[dict]:
    """A row for each run in the folder: its last step and losses."""
    found = []
    for path in sorted(folder.glob(f"runs/*/{METRICS}")):
        last: dict = {}
        for record in read_metrics(path):
            last |= record
        names = {"step": "step", "loss": "training loss", "val_loss": "validation loss", "tokens_per_s": "tokens/s"}
        found.append({"run": path.parent.name} | {name: last.get(key) for key, name in names.items()})
    return found


def page(folder: Path, found: dict[tuple[str, str], dict], any_hardware: bool) -> str:
    """The page in markdown."""
    best = " ".join(f"--{setting}" for setting in BEST)
    rows = failures(folder, any_hardware) | found
    others = [row for key, row in rows.items() if key[1] != "best" or key not in found]
    keys = ("size", "side", "micro_batch", "tokens_per_s", "mfu", "memory_gb", "estimate_gb", "optimizer_share", "note")
    sweeps = sorted(folder.glob(f"sweep_first_gpu_{'smoke' if any_hardware else 'gpu'}*.md"))
    facts = [row for _, rows in results(folder, "facts", any_hardware) for row in rows]
    parts = {
        "Machine": "\n".join(table_of_records([row]) for row in facts),
        "Training speed": f"Steps of 480 sequences with `{best}`.\n\n{speed_table(found)}",
        "Other settings": table_of_records([{k: r.get(k) for k in keys} for r in others]) if others else "",
        "Correctness": table_of_records(checked) if (checked := checks(folder, any_hardware)) else "",
        "Runs": table_of_records(runs) if (runs := trained(folder)) else "",
        "A short comparison": sweeps[0].read_text(encoding="utf-8").partition("\n")[2] if sweeps else "",
    }
    text = "\n".join(f"## {title}\n\n{part or 'Not measured.' + chr(10)}" for title, part in parts.items())
    return f"# Measured on a GPU\n\n{text}"


def fill(path: Path, table: str) -> None:
    """Put a table between the two marks of a file. Raises UserError if it has none."""
    text = path.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        raise UserError(f"{path}: has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_durably(path, f"{before}{BEGIN}\n{table}{END}{after}".encode())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.page", description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of results; default: bench/results")
    parser.add_argument("--any_hardware", action="store_true", help="take results of a CPU, too: a test of this page")
    parser.add_argument("--keep_docs", action="store_true", help="do not change the README and docs/performance.md")
    args = parser.parse_args(argv)
    with one_line("bench.page"):
        found = speeds(args.folder, args.any_hardware)
        if not found:
            raise UserError(f"{args.folder}: no result of bench.gpu on a GPU; scripts/gpu_quarter_hour.sh measures it")
        write_durably(args.folder / "gpu.md", page(args.folder, found, args.any_hardware).encode())
        if not args.keep_docs:
            fill(ROOT / "README.md", speed_table(found))
            fill(ROOT / "docs/performance.md", prediction_table(found))
        print(f"written to {args.folder / 'gpu.md'}")


if __name__ == "__main__":
    main()
