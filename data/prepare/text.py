"""The user's own files as documents: texts, JSON lines and parquet."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import TextIO

from data.prepare.formats import SourceFile
from data.prepare.sources import SUFFIXES, Undecodable, chunks_of, files_below, unlinked
from data.shards import DataError

PIECE_BYTES = 1 << 16  # larger files are cut into pieces of this size, so that the validation set has a part of each
MIN_PIECES = 200  # a small corpus is cut into at least this many pieces, so that it gets a validation set
READ = 1 << 20
GLOB = "**/*.txt"


def text_files(root: Path, patterns: Sequence[str] = (GLOB,), exclude: Sequence[str] = ()) -> list[Path]:
    """The files under root that match a glob, suffixes in small or capital letters; root itself if it is a file.

    Raises DataError if there are none.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"--root {root}: no such file or folder")
    found: dict[str, Path] = {}
    for asked in patterns:
        try:
            for pattern in without_braces(asked):
                found |= files_below(root, in_any_case(pattern), exclude)
        except (NotImplementedError, ValueError) as error:  # pathlib refuses the pattern
            raise DataError(f'--glob "{asked}": {error}; give a pattern like {GLOB}') from None
    if not found:
        asked = '" or "'.join(patterns)
        there = f"; it holds {listed(kinds)}" if (kinds := others(root, [], exclude)) else ""
        raise DataError(f'no file under {root} matches "{asked}"{there}')
    return list(unlinked(found).values())


def without_braces(pattern: str) -> list[str]:
    """A pattern for each choice of a pattern with braces: a.{txt,md} gives a.txt and a.md."""
    choice = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not choice:
        return [pattern]
    ways = (pattern[: choice.start()] + way + pattern[choice.end() :] for way in choice[1].split(","))
    return [each for way in ways for each in without_braces(way)]


def in_any_case(pattern: str) -> str:
    """A glob whose suffix matches small and capital letters."""
    suffix = PurePath(pattern).suffix
    if not suffix.removeprefix(".").isalnum():
        return pattern
    either = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix)
    return pattern.removesuffix(suffix) + either


def others(root: Path, taken: Sequence[Path], exclude: Sequence[str] = ()) -> Counter[str]:
    """How many files of a folder are not taken, by suffix."""
    names = {path.relative_to(root).as_posix() for path in taken}
    left = (path for name, path in files_below(root, "**/*", exclude).items() if name not in names)
    return Counter(path.suffix.lower() or path.name for path in left)


def listed(kinds: Counter[str]) -> str:
    """Counts of suffixes as text: "2 .md, 1 .pdf"."""
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(4)) + ", ..." * (len(kinds) > 4)


def say_what_is_left_out(folder: Path, taken: Sequence[Path], exclude: Sequence[str], which: str) -> None:
    """Print one line if a folder has other files than the taken ones; which: the rule that chose these."""
    if left := others(folder, taken, exclude):
        print(f"{folder}: {len(taken)} of {len(taken) + left.total()} files {which}; left out: {listed(left)}")


def documents(root: Path, files: list[Path], column: str = "text") -> Iterator[tuple[str, str | Undecodable, float]]:
    """Yield (name, text, fraction of the bytes read) of files below root.

    Large texts come in pieces, one that is not UTF-8 not at all. Files with records, such as JSON lines, give the text
    of each record; column: its name there.
    """
    sizes = [p.stat().st_size for p in files]
    total, before = max(1, sum(sizes)), 0
    piece = min(PIECE_BYTES, max(512, total // MIN_PIECES))
    for path, size in zip(files, sizes, strict=True):
        name = path.relative_to(root).as_posix()
        found = records(path, column) if holds_records(path) else pieces_of(path, piece)
        for place, text, read in found:
            yield f"{name}#{place}", text, (before + min(size, read)) / total
        before += size


def holds_records(path: Path) -> bool:
    """Whether the suffix says that a file is read like those of a corpus: JSON lines, parquet and compressed texts."""
    return path.name.lower().endswith(SUFFIXES) and path.suffix.lower() != ".txt"


def records(path: Path, column: str) -> Iterator[tuple[int, str | Undecodable, float]]:
    """(number, text, bytes read) of the records of a file."""
    size, number = path.stat().st_size, 0
    file = SourceFile(path.name, size, str(path), partial(path.open, "rb"))  # type: ignore[arg-type]
    for chunk in chunks_of(file, column, 0):
        for text in chunk.texts():
            yield number, text, chunk.fraction * size
            number += 1


def pieces_of(path: Path, piece: int) -> Iterator[tuple[int, str | Undecodable, float]]:
    """(first character, text, bytes read) of the pieces of a text file."""
    try:
        bad = undecodable_byte(path)
        if bad is not None:
            yield 0, Undecodable(f"{path}: not UTF-8 (byte {bad})"), path.stat().st_size
            return
        with open(path, encoding="utf-8", newline="") as f:  # line ends stay as they are
            for start, text in text_pieces(f, piece):
                yield start, text, f.buffer.tell()  # type: ignore[attr-defined]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); the same command continues") from None


def undecodable_byte(path: Path) -> int | None:
    """Position of the first byte that is not UTF-8; None if there is none."""
    with open(path, encoding="utf-8", newline="") as f:
        try:
            while f.read(READ):
                pass
        except UnicodeDecodeError as error:  # error.object: the bytes read last
            return f.buffer.tell() - len(error.object) + error.start  # type: ignore[attr-defined]
    return None


def text_pieces(f: TextIO, size: int) -> Iterator[tuple[int, str]]:
    """(start, text): a file cut into pieces of about `size` characters, at line ends, in long lines at spaces."""
    text, start, at_end = f.read(1).removeprefix("\ufeff"), 0, False  # without a byte-order mark
    while text or not at_end:
        end = text.find("\n", size, 2 * size) + 1 or text.find(" ", 2 * size) + 1
        if not at_end and (not end or len(text) - end < size):
            block = f.read(READ)
            text, at_end = text + block, not block
            continue
        if not end or len(text) - end < size // 2:
            end = len(text)
        if end:
            yield start, text[:end]
        text, start = text[end:], start + end
