"""Where documents come from. A source cuts its documents into chunks, which workers decode and tokenize.

Each chunk knows the position at which the next one starts, so that a preparation can continue there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tqdm.contrib.concurrent import thread_map

from data.prepare.formats import grouped, line_groups, open_parquet, opened, parquet_values, readable
from data.shards import DataError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")


@dataclass(frozen=True)
class Undecodable:
    """A document that cannot be read as text, and its place in the source."""

    where: str


Documents = Iterator[str | Undecodable]


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: the items as they are, or what `decode` makes of them in a worker."""

    after: tuple[int, ...]  # position at which the next chunk starts
    fraction: float  # of the source that lies before that position
    items: Sequence[Any]
    decode: Callable[[Sequence[Any]], Documents] = iter
    names: tuple[str, ...] | None = None  # of the documents, where the split depends on them

    @property
    def size(self) -> int:
        """About the bytes that the chunk holds."""
        return sum(len(item) for item in self.items if isinstance(item, str | bytes))

    def texts(self) -> Documents:
        return self.decode(self.items)


class Source(Protocol):
    """What the pipeline needs of a source."""

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]: ...


class Named:
    """Documents (name, text, fraction read so far) from a generator that always gives the same ones."""

    def __init__(self, documents: Iterable[tuple[str, str | Undecodable, float]]) -> None:
        self.documents = documents

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks of the documents from number position[0] on."""
        count = position[0] if position else 0
        for group in grouped(islice(self.documents, count, None), lambda d: len(d[1]) if isinstance(d[1], str) else 0):
            count += len(group)
            names, texts, fractions = zip(*group, strict=True)
            yield Chunk((count,), fractions[-1], texts, names=names)


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # if the hub states it


class Folder(Protocol):
    """Files in a fixed order, on this machine or on the hub."""

    files: list[SourceFile]

    def documents(self, file: SourceFile, column: str) -> int: ...

    def chunks(self, file: SourceFile, column: str, start: int) -> Iterator[Chunk]: ...


class LocalFolder:
    """The corpus files in a folder, in the order of their names."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"--source {root}: no such folder")
        found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        self.root = root
        self.files = [SourceFile(n, p.stat().st_size) for n, p in sorted(found.items()) if n.endswith(SUFFIXES)]
        if not self.files:
            raise DataError(f"--source {root}: holds no {', '.join(SUFFIXES)} file")

    def documents(self, file: SourceFile, column: str) -> int:
        """Number of documents in a file: rows of parquet, lines of JSON, or one for a text file."""
        path = self.root / file.name
        if path.suffix == ".parquet":
            return open_parquet(path, column, str(path)).metadata.num_rows
        return sum(len(lines) for lines, _ in line_groups(path, 0)) if ".jsonl" in path.suffixes else 1

    def chunks(self, file: SourceFile, column: str, start: int) -> Iterator[Chunk]:
        """Chunks of a file from row or line `start` on. Raises DataError if it cannot be read."""
        path = self.root / file.name
        if path.suffix == ".parquet":
            parquet = open_parquet(path, column, str(path))
            with readable(path):
                yield from parquet_chunks(parquet, column, str(path), start)
        elif ".jsonl" in path.suffixes:
            for lines, fraction in line_groups(path, start):
                decode = partial(decode_lines, path, column, start)
                start += len(lines)
                yield Chunk((start,), fraction, lines, decode)
        elif start == 0:
            yield Chunk((1,), 1.0, [path], decode_files)

    def digest(self) -> str:
        """A hash of the names and sizes of the files."""
        return hashlib.sha256(repr([(f.name, f.size) for f in self.files]).encode()).hexdigest()[:16]


class Files:
    """The documents of a folder, one file after the other. A text file is one document."""

    def __init__(self, folder: Folder, column: str = "text") -> None:
        self.folder, self.column = folder, column

    def documents(self) -> int:
        """Number of documents in all files."""
        count = partial(self.folder.documents, column=self.column)
        bar = dict(desc="counting documents", unit=" files", disable=None)
        return sum(thread_map(count, self.folder.files, max_workers=8, **bar))

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks from position (file, row or line) on. Raises DataError for a file that cannot be read."""
        files = self.folder.files
        first, start = position or (0, 0)
        total, before = sum(f.size for f in files) or 1, sum(f.size for f in files[:first])
        for number, file in enumerate(files[first:], first):
            with closing(self.folder.chunks(file, self.column, start)) as chunks:
                for chunk in chunks:
                    fraction = (before + chunk.fraction * file.size) / total
                    yield replace(chunk, after=(number, *chunk.after), fraction=fraction)
            start, before = 0, before + file.size


def parquet_chunks(file: Any, column: str, name: str, start: int) -> Iterator[Chunk]:
    """Chunks of the rows of a pyarrow ParquetFile from number `start` on."""
    for values in grouped(parquet_values(file, column, start), lambda value: len(value or b"")):
        decode = partial(decode_rows, name, start)
        start += len(values)
        yield Chunk((start,), start / file.metadata.num_rows, values, decode)


def decode_rows(name: str, first: int, values: Sequence[bytes | None]) -> Documents:
    """The documents of parquet rows. Row numbers start at 0."""
    for row, value in enumerate(values, first):
        where = f"{name}: row {row}"
        yield Undecodable(f"{where}: no text") if value is None else decode_utf8(value, where)


def decode_lines(path: Path, column: str, first: int, lines: Sequence[bytes]) -> Documents:
    """The documents of JSON lines. Line numbers start at 1 and leave out blank lines."""
    for number, line in enumerate(lines, first + 1):
        where = f"{path}: line {number}"
        text = decode_utf8(line, where)
        if isinstance(text, str):
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            record = record if isinstance(record, dict) else {}
            text = record.get(column)
            if not isinstance(text, str):
                keys = ", ".join(record)
                raise DataError(f'{where}: no string "{column}" in it (it has: {keys}); choose one with --column')
        yield text


def decode_files(paths: Sequence[Path]) -> Documents:
    """Text files, each as one document."""
    for path in paths:
        with opened(path) as (content, _):
            yield decode_utf8(content.read(), str(path))


def decode_utf8(content: bytes, where: str) -> str | Undecodable:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Undecodable(f"{where}: not UTF-8 (byte {error.start})")
