"""Reading corpus files: lines, compressed or not, and parquet. Every fault names the file."""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from data.shards import DataError

CHUNK_BYTES = 1 << 20  # a tenth of a second of tokenization: enough to hide the hand-over, little enough to spread
CHUNK_DOCUMENTS = 512
BATCH_ROWS = 256  # of a parquet file decoded at a time

T = TypeVar("T")


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


def grouped(documents: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The documents in lists, each as large as a chunk may be; size: bytes or characters of one."""
    group, held = [], 0
    for document in documents:
        group.append(document)
        held += size(document)
        if held >= CHUNK_BYTES or len(group) == CHUNK_DOCUMENTS:
            yield group
            group, held = [], 0
    if group:
        yield group


def line_blocks(path: Path, start: int) -> Iterator[tuple[int, float, list[bytes]]]:
    """(number behind the block, done share of the file, its lines) of the lines that are not blank."""
    size = max(1, path.stat().st_size)
    with opened(path) as (stream, raw):
        for lines in grouped(islice((line for line in stream if line.strip()), start, None), len):
            start += len(lines)
            yield start, min(1.0, raw.tell() / size), lines


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
    count = schema.names.count(column)
    if count != 1:
        columns = "columns" if count else "column"
        raise DataError(f'{name}: {count or "no"} {columns} "{column}"; it has {there}: name one with --column')
    if str(schema.field(column).type) not in ("string", "large_string", "string_view"):
        raise DataError(f'{name}: column "{column}" is {schema.field(column).type}, not text; it has {there}')
    return file.metadata.num_rows


def parquet_values(path: Path, column: str, start: int) -> Iterator[bytes | None]:
    """The texts of a column from row `start` on, not yet decoded, a few at a time however large a row group is."""
    file = parquet_library().ParquetFile(path, buffer_size=1 << 20)
    groups = list(range(file.num_row_groups))
    while groups and start >= file.metadata.row_group(groups[0]).num_rows:
        start -= file.metadata.row_group(groups.pop(0)).num_rows
    batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column], use_threads=False)
    yield from batched_values(batches, start)


def batched_values(batches: Iterable, start: int) -> Iterator[bytes | None]:
    """The values of Arrow batches or tables of one text column, from number `start` on, as bytes."""
    for batch in batches:
        skipped = min(start, len(batch))
        start -= skipped
        yield from batch.column(0).cast("large_binary").to_pylist()[skipped:]


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
