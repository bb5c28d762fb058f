"""Where documents come from. A source cuts its documents into chunks, which workers decode and tokenize.

Each chunk knows the position at which the next one starts, so that a preparation can continue there.
"""

import fnmatch
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tqdm.contrib.concurrent import thread_map

from data.prepare.formats import SourceFile, grouped, line_groups, opened, opened_parquet, parquet_values
from data.shards import DataError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT = (".txt", ".txt.gz", ".txt.zst")
BOM = b"\xef\xbb\xbf"  # a byte-order mark, which some editors write at the start of a file
SUFFIXES = (".parquet", *LINES, *TEXT)


@dataclass(frozen=True)
class Undecodable:
    """A document that cannot be read as text, and its place in the source."""

    where: str


Documents = Iterator[str | Undecodable]


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents. `texts` decodes them; it holds all that is needed, so that a worker can call it."""

    after: tuple[int, ...]  # position at which the next chunk starts
    fraction: float  # part of the source before that position
    texts: Callable[[], Documents]
    names: tuple[str, ...] | None = None  # names of the documents, if the split depends on them


Chunks = Generator[Chunk, None, None]


class Source(Protocol):
    """What the pipeline needs of a source."""

    def chunks(self, position: tuple[int, ...]) -> Chunks: ...


class Named:
    """Documents (name, text, fraction read so far) from a generator that always gives the same ones."""

    def __init__(self, documents: Iterable[tuple[str, str | Undecodable, float]]) -> None:
        self.documents = documents

    def chunks(self, position: tuple[int, ...]) -> Chunks:
        """Chunks of the documents from number position[0] on."""
        count = position[0] if position else 0
        for group in grouped(islice(self.documents, count, None), lambda d: len(d[1]) if isinstance(d[1], str) else 0):
            count += len(group)
            names, texts, fractions = zip(*group, strict=True)
            yield Chunk((count,), fractions[-1], partial(iter, texts), names)


def files_below(root: Path, pattern: str, exclude: Sequence[str] = ()) -> dict[str, Path]:
    """The files under root that match a glob, by name within root, in the order of the names.

    Hidden files and folders are left out, unless the glob names one. A file is also left out if its name, or the name
    of a folder around it, matches one of the patterns `exclude`. A file that is there twice through links counts once.
    """
    hidden_too, found = "/." in f"/{pattern}", {}
    for path in root.glob(pattern):
        parts = path.relative_to(root).parts
        names = (path.relative_to(root).as_posix(), *parts)
        hidden = not hidden_too and any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and not any(fnmatch.fnmatch(n, x) for n in names for x in exclude):
            found[names[0]] = path
    return unlinked(found)


def unlinked(files: dict[str, Path]) -> dict[str, Path]:
    """Files in the order of their names. One that is there twice through links counts once."""
    by_identity: dict[tuple[int, int], str] = {}
    for name, path in sorted(files.items()):
        by_identity.setdefault((path.stat().st_dev, path.stat().st_ino), name)
    return {name: files[name] for name in by_identity.values()}


def local_files(root: Path, exclude: Sequence[str] = ()) -> list[SourceFile]:
    """The corpus files in a folder, in the order of their names."""
    if not root.is_dir():
        raise DataError(f"--source {root}: no such folder")
    found = {n: p for n, p in files_below(root, "**/*", exclude).items() if n.lower().endswith(SUFFIXES)}
    if not found:
        raise DataError(f"--source {root}: holds no {', '.join(SUFFIXES)} file")
    opener: Any = open
    return [SourceFile(n, p.stat().st_size, str(p), partial(opener, p, "rb")) for n, p in found.items()]


class Files:
    """The documents of files, one file after the other."""

    def __init__(self, files: Sequence[SourceFile], column: str = "text") -> None:
        self.files, self.column = files, column

    def documents(self) -> int:
        """Number of documents in all files."""
        count = partial(documents_in, column=self.column)
        bar = dict(desc="counting documents", unit=" files", disable=None)
        return sum(thread_map(count, self.files, max_workers=8, **bar))

    def chunks(self, position: tuple[int, ...]) -> Chunks:
        """Chunks from position (file, row or line) on. Raises DataError for a file that cannot be read."""
        first, start = position or (0, 0)
        total, before = sum(f.size for f in self.files) or 1, sum(f.size for f in self.files[:first])
        for number, file in enumerate(self.files[first:], first):
            with closing(chunks_of(file, self.column, start)) as chunks:
                for chunk in chunks:
                    fraction = (before + chunk.fraction * file.size) / total
                    yield replace(chunk, after=(number, *chunk.after), fraction=fraction)
            start, before = 0, before + file.size


def documents_in(file: SourceFile, column: str) -> int:
    """Number of documents in a file: rows of parquet, lines of JSON, or one for a text file."""
    if file.lower_name.endswith(".parquet"):
        with opened_parquet(file, column) as parquet:
            return parquet.metadata.num_rows
    return sum(len(lines) for lines, _ in line_groups(file, 0)) if file.lower_name.endswith(LINES) else 1


def chunks_of(file: SourceFile, column: str, start: int) -> Chunks:
    """Chunks of a file from row or line `start` on. Raises DataError if it cannot be read."""
    if file.lower_name.endswith(".parquet"):
        with opened_parquet(file, column) as parquet:
            for values in grouped(parquet_values(parquet, column, start), lambda value: len(value or b"")):
                texts = partial(decode_rows, file.title, start, values)
                start += len(values)
                yield Chunk((start,), start / parquet.metadata.num_rows, texts)
    elif file.lower_name.endswith(LINES):
        for lines, fraction in line_groups(file, start):
            texts = partial(decode_lines, file.title, column, start, lines)
            start += len(lines)
            yield Chunk((start,), fraction, texts)
    elif file.lower_name.endswith(TEXT) and start == 0:
        yield Chunk((1,), 1.0, partial(decode_file, file))
    elif start == 0:
        raise DataError(f"{file.title}: not a {', '.join(SUFFIXES)} file")


def decode_rows(title: str, first: int, values: Sequence[bytes | None]) -> Documents:
    """The documents of parquet rows. Row numbers start at 0."""
    for row, value in enumerate(values, first):
        where = f"{title}: row {row}"
        yield Undecodable(f"{where}: no text") if value is None else decode_utf8(value, where)


def decode_lines(title: str, column: str, first: int, lines: Sequence[bytes]) -> Documents:
    """The documents of JSON lines. Line numbers start at 1 and leave out blank lines."""
    for number, line in enumerate(lines, first + 1):
        where = f"{title}: line {number}"
        decoded = decode_utf8(line.removeprefix(BOM) if number == 1 else line, where)
        if isinstance(decoded, str):
            try:
                record = json.loads(decoded)
            except (ValueError, RecursionError):
                yield Undecodable(f"{where}: not JSON")  # often the last line of an interrupted download
                continue
            record = record if isinstance(record, dict) else {}
            keys = ", ".join(record)
            value = record.get(column)
            problem = f'no string "{column}" in it (it has: {keys}); choose one with --column'
            if value is None and column in record:
                problem = "no text"
            decoded = value if isinstance(value, str) else Undecodable(f"{where}: {problem}")
        yield decoded


def decode_file(file: SourceFile) -> Documents:
    """A text file as one document."""
    with opened(file) as (content, _):
        yield decode_utf8(content.read().removeprefix(BOM), file.title)


def decode_utf8(content: bytes, where: str) -> str | Undecodable:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Undecodable(f"{where}: not UTF-8 (byte {error.start})")
