"""The embedded corpus: English prose from Python code that is installed wherever this project runs.

It holds the docstrings, and the comments of three lines or more, of the standard library, numpy and torch: about
12 MB. The text depends on the installed versions, which the manifest names. Losses can be compared only between
machines with equal versions.
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
PACKAGES = ("numpy", "torch")
SHORTEST = 40  # characters; shorter paragraphs are mostly headings and parameter names


def source() -> dict:
    """What the manifest records about the origin of the text."""
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    return {"name": "pydocs", "python": platform.python_version(), **versions}


def documents() -> Iterator[tuple[str, str, float]]:
    """Yield (name, text, fraction of the files read): one document per file with prose, in the order of names."""
    roots = {"python": sysconfig.get_paths()["stdlib"]}
    for package in PACKAGES:
        if (spec := find_spec(package)) and spec.origin:
            roots[package] = os.path.dirname(spec.origin)
    files = {f"{label}/{p.relative_to(root).as_posix()}": p for label, root in roots.items() for p in code_files(root)}
    seen: set[bytes] = set()
    for number, (name, path) in enumerate(sorted(files.items()), 1):
        try:
            code = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        paragraphs = []
        for paragraph in prose(code):
            digest = hashlib.blake2b(paragraph.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                paragraphs.append(paragraph)
        if paragraphs:
            yield name, "\n\n".join(paragraphs) + "\n", number / len(files)


def code_files(root: str) -> Iterator[Path]:
    """The Python files in a folder, without tests and other packages."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in SKIPPED and not d.endswith("-packages")]
        yield from (Path(folder, f) for f in files if f.endswith(".py"))


def prose(code: str) -> Iterator[str]:
    """The paragraphs of a file's docstrings, then of its comment blocks."""
    blocks = [m.group(2) for m in DOCSTRING.finditer(code)]
    blocks += [COMMENT_MARK.sub("", m.group()) for m in COMMENT_BLOCK.finditer(code)]
    for block in blocks:
        for paragraph in re.split(r"\n[ \t]*\n", inspect.cleandoc(block)):
            if len(paragraph.strip()) > SHORTEST:
                yield paragraph.strip("\n")
