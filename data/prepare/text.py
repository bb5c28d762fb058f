"""The user's own text files as documents."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data.prepare.sources import Undecodable
from data.shards import DataError

PIECE_BYTES = 1 << 16  # larger files are cut into pieces of this size, so that validation sees some of each
MIN_PIECES = 200  # smaller corpora are cut finer, so that there is a validation set at all
READ = 1 << 20


def text_files(root: Path, pattern: str) -> list[Path]:
    """The files under root that match the glob; DataError if there are none."""
    if not root.is_dir():
        raise DataError(f"--root {root}: no such folder")
    files = sorted(p for p in root.glob(pattern) if p.is_file())
    if not files:
        raise DataError(f'no file under {root} matches "{pattern}"')
    return files


def documents(root: Path, files: list[Path]) -> Iterator[tuple[str, str | Undecodable, float]]:
    """Yield (name, text, share of the bytes read), large files in pieces; a file that is not UTF-8 as Undecodable."""
    sizes = [p.stat().st_size for p in files]
    total, before = max(1, sum(sizes)), 0
    piece = min(PIECE_BYTES, max(512, total // MIN_PIECES))
    for path, size in zip(files, sizes, strict=True):
        name, bad = path.relative_to(root).as_posix(), undecodable_byte(path)
        if bad is not None:
            yield name, Undecodable(f"{path}: not UTF-8 (byte {bad})"), (before + size) / total
        else:
            with open(path, encoding="utf-8") as f:
                for start, text in _pieces(f, piece):
                    yield f"{name}#{start}", text, (before + min(size, f.buffer.tell())) / total
        before += size


def undecodable_byte(path: Path) -> int | None:
    """Where a file ceases to be UTF-8; None if it does not."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as f:
        while True:
            block, pending = f.read(READ), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            if not block:
                return None
            before += len(block)


def _pieces(f: TextIO, size: int) -> Iterator[tuple[int, str]]:
    """(start, text): a file cut into pieces of about `size` characters, at line ends, in long lines at spaces."""
    text, start, ended = "", 0, False
    while text or not ended:
        end = text.find("\n", size, 2 * size) + 1 or text.find(" ", 2 * size) + 1
        if not ended and (not end or len(text) - end < size):
            block = f.read(READ)
            text, ended = text + block, not block
            continue
        if not end or len(text) - end < size // 2:
            end = len(text)
        if end:
            yield start, text[:end]
        text, start = text[end:], start + end
