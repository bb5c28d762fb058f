"""Reading corpus files: compressed or not, lines, and parquet footers. Every fault names the file."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.shards import DataError

CHUNK_BYTES = 1 << 20  # a fifth of a second of tokenization: enough to hide the hand-over, little enough to spread
CHUNK_DOCUMENTS = 512
PART_BYTES = 1 << 26  # of text in a part of a parquet row group: bounds the memory of a worker


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file opened for reading, decompressed by its suffix, and the file below it; DataError if it is damaged."""
    with open(path, "rb") as raw:
        stream: BinaryIO = raw
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise ImportError(f"{path}: reading .zst files needs: pip install zstandard") from None
            stream = io.BufferedReader(
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20
            )
        try:
            yield stream, raw
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged or cut off ({first_line(error)})") from None
        except Exception as error:
            if type(error).__module__.startswith("zstandard"):
                raise DataError(f"{path}: damaged or cut off ({first_line(error)})") from None
            raise


def line_blocks(path: Path, start: int) -> Iterator[tuple[int, float, list[bytes]]]:
    """(number behind the block, done share of the file, its lines) of the lines that are not blank."""
    size = max(1, path.stat().st_size)
    with opened(path) as (stream, raw):
        lines, held, number = [], 0, 0
        for line in stream:
            if not line.strip():
                continue
            number += 1
            if number <= start:
                continue
            lines.append(line)
            held += len(line)
            if held >= CHUNK_BYTES or len(lines) == CHUNK_DOCUMENTS:
                yield number, min(0.999, raw.tell() / size), lines
                lines, held = [], 0
        if lines:
            yield number, 1.0, lines


def parquet_library() -> object:
    """pyarrow.parquet; ImportError names the package."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("reading parquet needs: pip install pyarrow") from None
    return pq


def parquet_rows(path: Path | BinaryIO, column: str, name: str = "") -> int:
    """Rows of a parquet file, from its footer; DataError if it has no such text column."""
    pq = parquet_library()
    name = name or str(path)
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: not a readable parquet file ({first_line(error)}); fetch it again") from None
    schema = file.schema_arrow
    there = ", ".join(schema.names)
    if column not in schema.names:
        raise DataError(f'{name}: no column "{column}"; it has {there}: name one with --column')
    if str(schema.field(column).type) not in ("string", "large_string", "string_view"):
        raise DataError(f'{name}: column "{column}" is {schema.field(column).type}, not text; it has {there}')
    return file.metadata.num_rows


def parquet_parts(path: Path, column: str) -> list[tuple[int, int, int]]:
    """(row group, first row, row behind the last) of the parts of a file: row groups, large ones cut by rows."""
    file = parquet_library().ParquetFile(path)
    number, parts = file.schema_arrow.names.index(column), []
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        flat = facts.num_columns == len(file.schema_arrow.names)  # else columns of the file are not those of the schema
        size = facts.column(number).total_uncompressed_size if flat else facts.total_byte_size
        step = max(1, facts.num_rows // max(1, size // PART_BYTES))
        parts += [(group, a, min(a + step, facts.num_rows)) for a in range(0, facts.num_rows, step)]
    return parts


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
