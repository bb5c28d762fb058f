"""Where documents come from: parquet, JSON lines and text files, cut into chunks that a worker reads or decodes.

A chunk knows the position behind it, so that a preparation can continue there, and yields its documents
in the order of the source. Parquet chunks name a row group and are read by the worker itself.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from data.formats import (
    CHUNK_BYTES,
    CHUNK_DOCUMENTS,
    first_line,
    line_blocks,
    opened,
    parquet_library,
    parquet_parts,
    parquet_rows,
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

    def done_with(self, chunk: Chunk) -> None: ...


class Named:
    """Documents (name, text, share read so far) from a generator that gives the same ones in the same order."""

    def __init__(self, documents: Iterable[tuple[str, str | Undecodable, float]]) -> None:
        self.documents = documents

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks of the documents from number position[0] on."""
        count = position[0] if position else 0
        names, texts, size = [], [], 0
        for name, text, done in islice(self.documents, count, None):
            names.append(name)
            texts.append(text)
            count, size = count + 1, size + (len(text) if isinstance(text, str) else 0)
            if size >= CHUNK_BYTES or len(texts) == CHUNK_DOCUMENTS:
                yield Chunk((count,), done, tuple(names), tuple(texts))
                names, texts, size = [], [], 0
        if texts:
            yield Chunk((count,), 1.0, tuple(names), tuple(texts))

    def done_with(self, chunk: Chunk) -> None:
        """Nothing to tidy up."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus; its folder's `fetch` says where it lies."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # where the hub states it


class Folder(Protocol):
    """Files in an order, here or to be fetched."""

    files: list[SourceFile]

    def fetch(self, file: SourceFile) -> Path: ...

    def release(self, file: SourceFile) -> None: ...

    def documents(self, column: str) -> int: ...


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

    def fetch(self, file: SourceFile) -> Path:
        return self.root / file.name

    def release(self, file: SourceFile) -> None:
        """The user's files stay."""

    def documents(self, column: str) -> int:
        """Documents in all files: from parquet footers, or by counting lines."""
        return sum(_documents(self.root / f.name, column) for f in self.files)

    def digest(self) -> str:
        """A name for this state of the folder: sha256 over names and sizes."""
        return hashlib.sha256(repr([(f.name, f.size) for f in self.files]).encode()).hexdigest()[:16]


class Files:
    """The documents of a folder of parquet, JSON lines and text files; a text file is one document."""

    def __init__(self, folder: Folder, column: str = "text") -> None:
        self.folder, self.column = folder, column

    def chunks(self, position: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks from position (file, row group or line) on. Raises DataError for a file that cannot be read."""
        files = self.folder.files
        first, start = position or (0, 0)
        total, before = sum(f.size for f in files) or 1, sum(f.size for f in files[:first])
        for number in range(first, len(files)):
            path, share = self.folder.fetch(files[number]), files[number].size / total
            for item, done, kind, facts in self._items(path, start):
                after = (number + 1, 0) if done == 1 else (number, item)
                yield kind(after, before / total + share * done, None, facts)
            start, before = 0, before + files[number].size

    def _items(self, path: Path, start: int) -> Iterator[tuple[int, float, type[Chunk], tuple]]:
        """(position behind it in the file, done share of the file, kind of chunk, its items)."""
        if path.suffix == ".parquet":
            parquet_rows(path, self.column)  # refuses a file without the column
            parts = parquet_parts(path, self.column)
            for number, part in enumerate(parts[start:], start + 1):
                yield number, number / len(parts), ParquetChunk, (str(path), self.column, *part)
        elif ".jsonl" in path.suffixes:
            for end, done, lines in line_blocks(path, start):
                yield end, done, JsonChunk, (str(path), self.column, end - len(lines), *lines)
        elif start == 0:
            yield 1, 1.0, TextFileChunk, (str(path),)

    def done_with(self, chunk: Chunk) -> None:
        """Let the folder drop the files that lie behind this chunk."""
        if chunk.after[0] > 0:
            self.folder.release(self.folder.files[chunk.after[0] - 1])


class ParquetChunk(Chunk):
    """A row group or some rows of it, read where they are tokenized, a few documents at a time."""

    def texts(self) -> Iterator[str | Undecodable]:
        pq = parquet_library()
        path, column, group, first, end = self.items
        row = 0
        try:
            file = pq.ParquetFile(path, buffer_size=1 << 20)
            for batch in file.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                skipped = min(max(0, first - row), len(batch))
                row += skipped
                for value in batch.column(0)[skipped : skipped + max(0, end - row)]:
                    where = f"{path}: row {row} of row group {group}"
                    row += 1
                    try:
                        text = value.as_py()
                        yield Undecodable(f"{where}: no text") if text is None else text
                    except UnicodeDecodeError as error:
                        yield Undecodable(f"{where}: not UTF-8 (byte {error.start})")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: row group {group} cannot be read ({first_line(error)})") from None


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


def _documents(path: Path, column: str) -> int:
    if path.suffix == ".parquet":
        return parquet_rows(path, column)
    if ".jsonl" in path.suffixes:
        return sum(len(lines) for _, _, lines in line_blocks(path, 0))
    return 1
