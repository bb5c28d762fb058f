"""Tables in markdown."""

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = True) -> str:
    """A table that ends with a newline. numbers: the columns after the first one are numbers, aligned at the right."""
    lines = [[cell(value).replace("|", r"\|") for value in row] for row in (header, *rows)]
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(header) - 1)
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "".join(f"{line}\n" for line in (first, rule, *others))


def table_of_records(records: Sequence[Mapping[str, object]]) -> str:
    """A table of records. A key that a record does not have is an empty cell."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    return markdown_table(keys, ([record.get(key) for key in keys] for record in records), numbers=False)


def cell(value: object) -> str:
    """The text of a value: four digits of a float, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
