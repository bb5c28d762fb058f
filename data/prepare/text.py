"""The user's own text files as documents."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TextIO

from data.prepare.sources import Undecodable, files_below
from data.shards import DataError

PIECE_BYTES = 1 << 16  # larger files are cut into pieces of this size, so that the validation set has a part of each
MIN_PIECES = 200  # a small corpus is cut into at least this many pieces, so that it gets a validation set
READ = 1 << 20


def text_files(root: Path, pattern: str, exclude: Sequence[str] = ()) -> list[Path]:
    """The files under root that match the glob, its suffix in small or capital letters; DataError if there are none."""
    asked = pattern
    if not root.is_dir():
        raise DataError(f"--root {root}: no such folder")
    suffix = PurePath(pattern).suffix
    if suffix.removeprefix(".").isalnum():
        either = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix)
        pattern = pattern.removesuffix(suffix) + either
    try:
        files = list(files_below(root, pattern, exclude).values())
    except (NotImplementedError, ValueError) as error:  # of pathlib
        raise DataError(f'--glob "{asked}": {error}; give a pattern like **/*.txt') from None
    if not files:
        raise DataError(f'no file under {root} matches "{asked}"')
    return files


def documents(root: Path, files: list[Path]) -> Iterator[tuple[str, str | Undecodable, float]]:
    """Yield (name, text, fraction of the bytes read). Large files come in pieces, one that is not UTF-8 not at all."""
    sizes = [p.stat().st_size for p in files]
    total, before = max(1, sum(sizes)), 0
    piece = min(PIECE_BYTES, max(512, total // MIN_PIECES))
    for path, size in zip(files, sizes, strict=True):
        name, bad = path.relative_to(root).as_posix(), undecodable_byte(path)
        if bad is not None:
            yield name, Undecodable(f"{path}: not UTF-8 (byte {bad})"), (before + size) / total
        else:
            with open(path, encoding="utf-8", newline="") as f:  # line ends stay as they are
                for start, text in text_pieces(f, piece):
                    yield f"{name}#{start}", text, (before + min(size, f.buffer.tell())) / total  # type: ignore[attr-defined]
        before += size


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
