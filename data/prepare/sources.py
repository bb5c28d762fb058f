"""Where documents come from: parquet, JSON lines and text files, cut into chunks that a worker decodes.

A chunk knows the position behind it, so that a preparation can continue there, and yields its documents
in the order of the source.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from tqdm.contrib.concurrent import thread_map

from data.prepare.formats import (
    first_line,
    grouped,
    line_blocks,
    opened,
    parquet_rows,
    parquet_values,
)
from data.shards import DataError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")


@dataclass(frozen=True)
class Undecodable:
    """A document that cannot be read as text, and where it stands."""

    where: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: texts, or what a subclass needs to read them."""

    after: tuple[int, ...]  # position behind this chunk
    fraction: float | None  # of the source that lies before that position, if known
    names: tuple[str, ...] | None = None  # of its documents, where the split depends on them
    items: tuple = ()

    @property
    def held(self) -> int:
        """About the bytes of the documents that are in the chunk itself."""
        return sum(len(item) for item in self.items if isinstance(item, str | bytes))

    def texts(self) -> Iterator[str | Undecodable]:
        yield from self.items


class Source(Protocol):
    """What the pipeline asks of a source."""

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]: ...


class Named:
    """Documents (name, text, share read so far) from a generator that gives the same ones in the same order."""

    def __init__(self, documents: Iterable[tuple[str, str | Undecodable, float]]) -> None:
        self.documents = documents

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks of the documents from number position[0] on."""
        count = position[0] if position else 0
        for group in grouped(islice(self.documents, count, None), lambda d: len(d[1]) if isinstance(d[1], str) else 0):
            count += len(group)
            names, texts, done = zip(*group, strict=True)
            yield Chunk((count,), done[-1], names, texts)


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # where the hub states it


class Folder(Protocol):
    """Files in an order, here or on the hub."""

    files: list[SourceFile]

    def documents(self, file: SourceFile, column: str) -> int: ...

    def chunks(self, file: SourceFile, column: str, start: int) -> "Iterator[Chunk]": ...


def parquet_chunks(name: str, rows: int, values: Iterator[bytes | None], start: int) -> Iterator[Chunk]:
    """Chunks of the texts of a parquet file's rows from number `start` on."""
    for group in grouped(values, lambda value: len(value or b"")):
        first, start = start, start + len(group)
        yield TextChunk((start,), start / rows, None, (name, first, *group))


class LocalFolder:
    """Files the user has, in the order of their names."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"--source {root}: no such folder")
        found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        self.root = root
        self.files = [SourceFile(n, p.stat().st_size) for n, p in sorted(found.items()) if n.endswith(SUFFIXES)]
        if not self.files:
            raise DataError(f"--source {root}: holds no {', '.join(SUFFIXES)} file")

    def documents(self, file: SourceFile, column: str) -> int:
        """Documents in a file: from a parquet footer, or by counting lines."""
        path = self.root / file.name
        if path.suffix == ".parquet":
            return parquet_rows(path, column)
        if ".jsonl" in path.suffixes:
            return sum(len(lines) for _, _, lines in line_blocks(path, 0))
        return 1

    def chunks(self, file: SourceFile, column: str, start: int) -> Iterator[Chunk]:
        """Chunks of a file from row or line `start` on; DataError if it cannot be read."""
        path = self.root / file.name
        if path.suffix == ".parquet":
            rows = parquet_rows(path, column)
            try:
                yield from parquet_chunks(str(path), rows, parquet_values(path, column, start), start)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None
        elif ".jsonl" in path.suffixes:
            for end, done, lines in line_blocks(path, start):
                yield JsonChunk((end,), done, None, (str(path), column, end - len(lines), *lines))
        elif start == 0:
            yield TextFileChunk((1,), 1.0, None, (str(path),))

    def digest(self) -> str:
        """A name for this state of the folder: sha256 over names and sizes."""
        return hashlib.sha256(repr([(f.name, f.size) for f in self.files]).encode()).hexdigest()[:16]


class Files:
    """The documents of a folder of files, one file after the other; a text file is one document."""

    def __init__(self, folder: Folder, column: str = "text") -> None:
        self.folder, self.column = folder, column

    def documents(self) -> int:
        """Documents in all files."""
        count = partial(self.folder.documents, column=self.column)
        look = dict(desc="counting documents", unit=" files", disable=None)
        return sum(thread_map(count, self.folder.files, max_workers=8, **look))

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks from position (file, row or line) on. Raises DataError for a file that cannot be read."""
        files = self.folder.files
        first, start = position or (0, 0)
        total, before = sum(f.size for f in files) or 1, sum(f.size for f in files[:first])
        for number, file in enumerate(files[first:], first):
            with closing(self.folder.chunks(file, self.column, start)) as chunks:
                for chunk in chunks:
                    done = (before + chunk.fraction * file.size) / total
                    yield replace(chunk, after=(number, *chunk.after), fraction=done)
            start, before = 0, before + file.size


class TextChunk(Chunk):
    """Rows of a text column, whose numbers in the file count from 0."""

    def texts(self) -> Iterator[str | Undecodable]:
        name, first, *values = self.items
        for row, value in enumerate(values, first):
            try:
                yield Undecodable(f"{name}: row {row}: no text") if value is None else value.decode("utf-8")
            except UnicodeDecodeError as error:
                yield Undecodable(f"{name}: row {row}: not UTF-8 (byte {error.start})")


class JsonChunk(Chunk):
    """Lines of a JSON lines file; line numbers count lines that are not blank, from 1."""

    def texts(self) -> Iterator[str | Undecodable]:
        path, column, first, *lines = self.items
        for number, line in enumerate(lines, first + 1):
            where = f"{path}: line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Undecodable(f"{where}: not UTF-8 (byte {error.start})")
                continue
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f'{where}: no string "{column}" in it (it has: {there}); name another with --column')
            yield record[column]


class TextFileChunk(Chunk):
    """A text file as one document."""

    def texts(self) -> Iterator[str | Undecodable]:
        path = Path(self.items[0])
        with opened(path) as (f, _):
            content = f.read()
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Undecodable(f"{path}: not UTF-8 (byte {error.start})")
