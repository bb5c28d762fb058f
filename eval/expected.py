"""The published losses at several token counts, on the page docs/expected_loss.md: python -m eval.expected"""

from pathlib import Path

from eval.table import SIZES, published
from runtime.command import Parser, one_line, short_count
from runtime.files import write_durably
from runtime.markdown import markdown_table

PAGE = "docs/expected_loss.md"
COUNTS = (1e9, 2.5e9, 5e9, 10e9, 25e9, 49.152e9)  # tokens; the published runs have 49.152 billion
NAMES = {"openwebtext": "OpenWebText", "fineweb-edu": "FineWeb-Edu"}
TEXT = """# Which loss to expect

`python -m eval.expected` writes this page from `eval/published.json`. Losses are validation losses in nats per token of
GPT-2's tokenizer, in runs of 49.152 billion tokens. Nothing on this page was measured with this repository.
`python scripts/report.py --on-track runs/NAME` compares your run with the numbers without a star. Between their token
counts it interpolates.

- **2.885**: the lowest validation loss up to this token count.
- **2.986\\***: the height of the published curve at this token count. A single evaluation is noisy: {why}.
- Empty: not published, or above the upper edge of the plot. At 1 billion tokens all curves are above it.

The loss depends on the budget of the run, because the learning rate falls until its end. So do not compare a run of
10 billion tokens with the column 10B. Moonlight (Muon with another scale) and MARS-M are above AdamW for most of the
run: their curves cross AdamW's between 40 and 45 billion tokens.

The plots of the MARS README end at other losses than its table. For MARS-AdamW, their lowest points are 2.877, 2.650
and 2.532, where the table has 2.849, 2.636 and 2.518. So they seem to show other runs. Muon's lowest points agree with
the table within 0.001.

{tables}
## Other people's runs

nanoGPT, LitGPT and llm.c use AdamW. Validation data, number of batches and budget differ, so expect differences of a
few hundredths.

{others}
## Sources

{sources}"""


def table(data: str) -> str:
    """A markdown table of the published losses on a dataset, a row for each size, optimizer and source."""
    rows: dict[tuple[str, str, str], dict[float, str]] = {}
    for star, records in (("*", published()["curves"]), ("", published()["losses"])):
        for r in records:
            if r["data"] == data and r["tokens"] in COUNTS and r.get("kind") != "last":
                source = r["source"].replace("MARS-M curve", "MARS-M plot")  # ends at the numbers of this plot
                rows.setdefault((r["size"], r["method"], source), {})[r["tokens"]] = f"{r['loss']:.3f}{star}"
    order = sorted(rows, key=lambda row: (list(SIZES).index(row[0]), *row[1:]))
    lines = [[*row[:2], *(rows[row].get(count, "") for count in COUNTS), row[2]] for row in order]
    return markdown_table(["size", "optimizer", *(short_count(round(c)) for c in COUNTS), "source"], lines)


def page() -> str:
    """The page in markdown."""
    numbers = published()
    header = ["who", "size", "evaluated on", "tokens", "loss", "error", "source"]
    others = [
        [e["who"], e["size"], e["data"], short_count(round(e["tokens"])) if e["tokens"] else "not published"]
        + [str(e["loss"]), f"{e['error']:g}", e["source"]]
        for e in numbers["endpoints"]
    ]
    errors = numbers["reading_error"]
    return TEXT.format(
        why=numbers["band"]["why"],
        tables="\n".join(f"## {name}\n\n{table(data)}" for data, name in NAMES.items()),
        others=markdown_table(header, others, numbers=False),
        sources="".join(f"- {k}: {numbers['sources'][k]}. Reading error {error:g}.\n" for k, error in errors.items()),
    )


def main(argv: list[str] | None = None) -> None:
    Parser(prog="eval.expected", description=__doc__).parse_args(argv)
    with one_line("eval.expected"):
        write_durably(Path(__file__).resolve().parent.parent / PAGE, page().encode())
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
