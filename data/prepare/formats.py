"""Reading corpus files: lines, compressed or not, and one column of a parquet file. Every error names the file."""

import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data.shards import DataError

CHUNK_BYTES = 1 << 20  # a chunk takes about 0.1 s to tokenize, far longer than it takes to send to a worker
CHUNK_DOCUMENTS = 512
BATCH_ROWS = 256  # parquet rows decoded at a time
BUFFER_BYTES = 1 << 20
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

T = TypeVar("T")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class name."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def library(module: str) -> Any:
    """Import a module of pyarrow or huggingface_hub; ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{module} is missing: pip install datasets") from None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors in reading a file into DataError."""
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow raises either for a damaged file
        raise DataError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file, decompressed according to its suffix, and the file itself."""
    with open(path, "rb") as file, readable(path):
        content: BinaryIO = file
        if path.suffix in COMPRESSION:
            stream = library("pyarrow").CompressedInputStream(file, COMPRESSION[path.suffix])
            content = io.BufferedReader(stream, BUFFER_BYTES)
        yield content, file


def grouped(documents: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Put documents into lists as large as a chunk may be; size: bytes or characters of one document."""
    group, total = [], 0
    for document in documents:
        group.append(document)
        total += size(document)
        if total >= CHUNK_BYTES or len(group) == CHUNK_DOCUMENTS:
            yield group
            group, total = [], 0
    if group:
        yield group


def line_groups(path: Path, start: int) -> Iterator[tuple[list[bytes], float]]:
    """Groups of the lines that are not blank, from number `start` on, each with the fraction of the file read."""
    size = max(1, path.stat().st_size)
    with opened(path) as (content, file):
        for group in grouped(islice((line for line in content if line.strip()), start, None), len):
            yield group, min(1.0, file.tell() / size)


def open_parquet(source: Path | BinaryIO, column: str, name: str) -> Any:
    """A parquet file as a pyarrow ParquetFile; DataError, with the name, if it lacks such a text column."""
    parquet = library("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(source, buffer_size=BUFFER_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: not a readable parquet file ({first_line(error)}); fetch it again") from None
    types = [str(field.type) for field in file.schema_arrow if field.name == column]
    if len(types) != 1 or types[0] not in ("string", "large_string", "string_view"):
        found = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)
        raise DataError(f'{name}: needs one text column "{column}"; it has {found}; choose one with --column')
    return file


def parquet_values(file: Any, column: str, start: int) -> Iterator[bytes | None]:
    """The texts of a column from row `start` on, not yet decoded. Memory stays small for any size of row group."""
    groups = list(range(file.num_row_groups))
    while groups and start >= file.metadata.row_group(groups[0]).num_rows:
        start -= file.metadata.row_group(groups.pop(0)).num_rows
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column], use_threads=False):
        skipped = min(start, len(batch))
        start -= skipped
        yield from batch.column(0).cast("large_binary").to_pylist()[skipped:]
