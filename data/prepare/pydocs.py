"""The embedded corpus: English prose from the Python code that every installation of this project holds.

Docstrings and comment blocks (three lines or more) of the standard library, numpy and torch: about
12 MB. The text follows the installed versions, so the manifest names them and losses compare only
between machines with equal versions.
"""

import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

DOCSTRING = re.compile(r'^[ \t]*[rRuU]?("""|\'\'\')(.+?)\1[ \t]*$', re.MULTILINE | re.DOTALL)
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#(?!!).*\n){3,}", re.MULTILINE)
COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
SKIPPED = {"test", "tests", "testing", "idlelib", "idle_test", "lib2to3", "__pycache__"}
SHORTEST = 40  # characters; shorter paragraphs are mostly headings and parameter names


def documents() -> Iterator[tuple[str, str, float]]:
    """Yield (name, text, share of the files read): one document per source file with prose, in the order of names."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for package in ("numpy", "torch"):
        spec = find_spec(package)
        assert spec, package
        assert spec.origin, package
        roots[package] = Path(spec.origin).parent
    files = {f"{label}/{p.relative_to(root).as_posix()}": p for label, root in roots.items() for p in _sources(root)}
    seen: set[bytes] = set()
    for number, (name, path) in enumerate(sorted(files.items()), 1):
        try:
            prose = _prose(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
        kept = []
        for paragraph in prose:
            digest = hashlib.blake2b(paragraph.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        if kept:
            yield name, "\n\n".join(kept) + "\n", number / len(files)


def source() -> dict:
    """What the manifest records of where the text came from."""
    versions = {p: importlib.metadata.version(p) for p in ("numpy", "torch")}
    return {"name": "pydocs", "python": platform.python_version(), **versions}


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in SKIPPED and not d.endswith("-packages")]
        yield from (Path(folder, f) for f in files if f.endswith(".py"))


def _prose(code: str) -> Iterator[str]:
    """The paragraphs of a file's docstrings, then of its comment blocks."""
    blocks = [inspect.cleandoc(m.group(2)) for m in DOCSTRING.finditer(code)]
    blocks += [inspect.cleandoc(COMMENT_MARK.sub("", m.group(0))) for m in COMMENT_BLOCK.finditer(code)]
    for block in blocks:
        for paragraph in re.split(r"\n[ \t]*\n", block):
            if len(paragraph.strip()) > SHORTEST:
                yield paragraph.strip("\n")
