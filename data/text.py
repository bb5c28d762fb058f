"""The user's own text files as documents."""

from collections.abc import Iterator
from pathlib import Path

from data.shards import DataError
from data.sources import Undecodable

PIECE_BYTES = 1 << 16  # larger files are cut into pieces of this size, so that validation sees some of each
MIN_PIECES = 200  # smaller corpora are cut finer, so that there is a validation set at all


def text_files(root: Path, pattern: str) -> list[Path]:
    """The files under root that match the glob; DataError if there are none."""
    if not root.is_dir():
        raise DataError(f"--root {root}: no such folder")
    files = sorted(p for p in root.glob(pattern) if p.is_file())
    if not files:
        raise DataError(f'no file under {root} matches "{pattern}"')
    return files


def documents(root: Path, files: list[Path]) -> Iterator[tuple[str, str | Undecodable]]:
    """Yield (name, text) of every file, large files in pieces; a file that is not UTF-8 as Undecodable."""
    piece = min(PIECE_BYTES, max(512, sum(p.stat().st_size for p in files) // MIN_PIECES))
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            yield name, Undecodable(f"{path}: not UTF-8 (byte {error.start})")
            continue
        yield from _pieces(name, text, piece)


def _pieces(name: str, text: str, size: int) -> Iterator[tuple[str, str]]:
    """Cut a text at line ends into pieces of about `size` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end == 0 or len(text) - end < size // 2:
            end = len(text)
        yield f"{name}#{start}", text[start:end]
        start = end
