"""One page of what was measured on a GPU: python -m bench.gpu_page

Reads the newest results of bench.correctness and bench.ladder and the sweep `first_gpu`, writes gpu.md and gpu.png
beside them, and fills the table "How fast" of the README.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bench.ladder import RUNGS
from bench.report import RESULTS, ROOT, markdown
from bench.timing import SIZES
from runtime.command import Parser, one_line
from runtime.errors import UserError
from training.plot import new_figure, save

BEGIN, END = "<!-- speed: written by python -m bench.gpu_page -->", "<!-- end of speed -->"


def results(folder: Path, bench: str, any_hardware: bool) -> Iterator[tuple[dict, list[dict]]]:
    """Facts and rows of the result files of a bench, the oldest first; only those of a GPU, unless any_hardware."""
    for path in sorted(folder.glob(f"{bench}_*.jsonl"), key=lambda p: (p.stem[-10:], p.stat().st_mtime)):
        facts, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if any_hardware or not facts["hardware"].startswith("cpu"):
            yield facts, rows


def speeds(folder: Path, any_hardware: bool) -> dict[str, dict]:
    """The newest numbers of the rung `best` of each size that was measured.

    ratio: to nanoGPT's way, on the same hardware on the same day; None if that is not measured.
    """
    newest: dict[tuple[str, str], dict] = {}
    for facts, rows in results(folder, "ladder", any_hardware):
        size = facts["bench"].split("_")[1]
        newest |= {(size, row["rung"]): row | facts for row in rows if "tokens_per_s" in row}
    found = {}
    for size in SIZES:
        if best := newest.get((size, "best")):
            peer = newest.get((size, "nanogpt"), {})
            together = all(best[key] == peer.get(key) for key in ("hardware", "torch", "date"))
            found[size] = best | dict(ratio=best["tokens_per_s"] / peer["tokens_per_s"] if together else None)
    return found


def table(found: dict[str, dict]) -> str:
    """The speeds in markdown, a row for each size."""
    rows = []
    for size in SIZES:
        row = {"size": size, "tokens/s": "not measured"}
        if numbers := found.get(size):
            row |= {"tokens/s": f"{numbers['tokens_per_s']:,.0f}", "MFU": _percent(numbers["mfu"])}
            row |= {"memory": f"{numbers['memory_gb']:.1f} GB"}
            row |= {"MARS-M's part of a step": _percent(numbers["optimizer_share"])}
            row |= {"against nanoGPT's way": f"{numbers['ratio']:.2f}x" if numbers["ratio"] else "not measured"}
            row |= {key: numbers[key] for key in ("hardware", "torch", "date")}
        rows.append(row)
    return markdown(rows)


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"


def checks(folder: Path, any_hardware: bool) -> list[dict]:
    """The rows of the newest bench.correctness."""
    *_, newest = [[], *(rows for _, rows in results(folder, "correctness", any_hardware))]
    return [{key: row[key] for key in ("what", "bound", "found", "result")} for row in newest if "result" in row]


def page(speed: str, checked: list[dict], comparison: str) -> str:
    """The page in markdown."""
    settings = dict(setting.split("=") for setting in (*RUNGS["best"], "micro_batch=auto"))  # later ones count
    given = " ".join(f"--{key}={value}" for key, value in settings.items())
    text = f"# Measured on a GPU\n\n## Training speed\n\nSteps of 480 sequences with `{given}`.\n\n{speed}\n"
    text += f"\n![tokens/s](gpu.png)\n\n## Correctness\n\n{markdown(checked) if checked else 'Not measured.'}\n"
    return text + f"\n## A short comparison\n\n{comparison or 'Not measured.'}\n"


def plot(found: dict[str, dict], path: Path) -> None:
    """Tokens per second by size."""
    figure = new_figure(6, 3.5)
    axes = figure.subplots()
    bars = axes.bar(list(found), [numbers["tokens_per_s"] for numbers in found.values()])
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set(ylabel="tokens/s", title=" ".join({numbers["hardware"] for numbers in found.values()}))
    save(figure, path)


def fill(readme: Path, speed: str) -> None:
    """Put the table between the two marks of the README. Raises UserError if it has none."""
    text = readme.read_text(encoding="utf-8")
    if not re.search(f"{BEGIN}.*{END}", text, re.DOTALL):
        raise UserError(f"{readme}: has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{speed}\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.gpu_page", description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of results; default: bench/results")
    parser.add_argument("--any_hardware", action="store_true", help="take results of a CPU, too: a test of this page")
    parser.add_argument("--keep_readme", action="store_true", help="do not change the README")
    args = parser.parse_args(argv)
    with one_line("bench.gpu_page"):
        found, checked = speeds(args.folder, args.any_hardware), checks(args.folder, args.any_hardware)
        if not found:
            raise UserError(f"{args.folder}: no result of bench.ladder on a GPU; run scripts/first_gpu_hour.sh there")
        # the report of the whole sweep, or else of some of its arms
        sweeps = sorted(args.folder.glob(f"sweep_first_gpu_{'smoke' if args.any_hardware else 'gpu'}*.md"))
        comparison = sweeps[0].read_text(encoding="utf-8").partition("\n")[2] if sweeps else ""
        (args.folder / "gpu.md").write_text(page(table(found), checked, comparison), encoding="utf-8")
        plot(found, args.folder / "gpu.png")
        if not args.keep_readme:
            fill(ROOT / "README.md", table(found))
        print(f"written to {args.folder / 'gpu.md'} and .png")


if __name__ == "__main__":
    main()
