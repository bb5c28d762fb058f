"""Reading corpus files: lines, compressed or not, and one column of a parquet file. Every error names the file."""

import errno
import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any, BinaryIO, TypeVar

from data.shards import DataError
from runtime.command import first_line
from runtime.errors import UserError

CHUNK_BYTES = 1 << 20  # a chunk takes about 0.1 s to tokenize, far longer than it takes to send to a worker
CHUNK_DOCUMENTS = 512
BATCH_ROWS = 256  # parquet rows decoded at a time
BUFFER_BYTES = 1 << 20
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # the disk, a file size or a quota is exhausted

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, on this machine or on the hub."""

    name: str  # within its folder
    size: int  # bytes
    title: str  # names it in messages
    open: Callable[[], AbstractContextManager[BinaryIO]]
    sha256: str | None = None  # if the hub states it

    @property
    def lower_name(self) -> str:
        """The name in small letters, whose suffix says how the file is read."""
        return self.name.lower()


def library(module: str) -> Any:
    """Import a module of pyarrow or huggingface_hub; ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is missing: pip install datasets") from None


@contextmanager
def opened(file: SourceFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file, decompressed according to its suffix, and the file itself; DataError if it is damaged."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(PurePath(file.lower_name).suffix)
    try:
        with file.open() as raw:
            stream = library("pyarrow").CompressedInputStream(raw, compression) if compression else None
            yield io.BufferedReader(stream, BUFFER_BYTES) if stream else raw, raw
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow raises either for a damaged file
        raise DataError(f"{file.title}: cannot be read ({first_line(error)}); fetch it again") from None


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


def line_groups(file: SourceFile, start: int) -> Iterator[tuple[list[bytes], float]]:
    """Groups of the lines that are not blank, from number `start` on, each with the fraction of the file read."""
    with opened(file) as (content, raw):
        for group in grouped(islice((line for line in content if line.strip()), start, None), len):
            yield group, min(1.0, raw.tell() / file.size)


@contextmanager
def opened_parquet(file: SourceFile, column: str) -> Iterator[Any]:
    """A pyarrow ParquetFile; DataError if it is damaged or has no such text column."""
    with opened(file) as (content, _):
        parquet = library("pyarrow.parquet").ParquetFile(content, buffer_size=BUFFER_BYTES)
        types = [str(field.type) for field in parquet.schema_arrow if field.name == column]
        if len(types) != 1 or types[0] not in ("string", "large_string", "string_view"):
            found = ", ".join(f"{field.name} ({field.type})" for field in parquet.schema_arrow)
            raise DataError(f'{file.title}: needs one text column "{column}"; it has {found}; choose one with --column')
        yield parquet


def parquet_values(parquet: Any, column: str, start: int) -> Iterator[bytes | None]:
    """The texts of a column from row `start` on, not yet decoded. Memory stays small for any size of row group."""
    groups = list(range(parquet.num_row_groups))
    while groups and start >= parquet.metadata.row_group(groups[0]).num_rows:
        start -= parquet.metadata.row_group(groups.pop(0)).num_rows
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=[column], use_threads=False):
        skipped = min(start, len(batch))
        start -= skipped
        yield from batch.column(0).cast("large_binary").to_pylist()[skipped:]
