"""What the file system of a folder can do: tried once before a run, because some network disks cannot do all of it."""

import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from runtime.errors import UserError
from runtime.files import CANNOT_SYNC_FOLDERS

# what is tried, and what follows if it fails; True: a run cannot do without it
NEEDS = {
    "write": ("no run can start here", True),
    "flush a file": ("no checkpoint can be kept here", True),
    "flush a folder": ("after a power failure the newest checkpoint may be missing", False),
    "lock a file": ("never start the same command twice at a time", False),
    "rename a file": ("no record or checkpoint can be kept here", True),
    "rename a folder": ("no checkpoint can be kept here", True),
}


def existing_parent(folder: Path) -> Path:
    """The nearest existing folder on the path of `folder`. Raises UserError if it cannot be written into."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run folder {folder}: {existing} cannot be written into; choose another with --log.folder")
    return existing


def probe(folder: Path) -> tuple[list[str], bool]:
    """A line for each thing that the file system cannot do, with what follows, and whether a run can do without.

    folder: exists. What is written there is deleted again.
    """
    try:
        place = Path(tempfile.mkdtemp(prefix=".preflight-", dir=folder))
    except OSError as error:
        return [f"{folder}: cannot write ({error.strerror}): {NEEDS['write'][0]}"], False
    file, subfolder = place / "file", place / "folder"

    def flush_file() -> None:
        with open(file, "r+b") as f:
            f.write(b"y")
            f.flush()
            os.fsync(f.fileno())

    def flush_folder() -> None:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def lock() -> None:
        with open(file, "r+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def rename_file() -> None:
        (place / "other").write_bytes(b"z")
        os.replace(place / "other", file)

    def rename_folder() -> None:
        subfolder.mkdir()
        subfolder.rename(place / "renamed")

    tries: list[Callable[[], object]] = [lambda: file.write_bytes(b"x"), flush_file, flush_folder, lock]
    tries += [rename_file, rename_folder]
    lines, enough = [], True
    for (what, (follows, needed)), attempt in zip(NEEDS.items(), tries, strict=True):
        try:
            attempt()
        except OSError as error:
            if what == "flush a folder" and error.errno not in CANNOT_SYNC_FOLDERS:  # then a checkpoint fails, too
                follows, needed = NEEDS["flush a file"]
            lines.append(f"{folder}: cannot {what} ({error.strerror}): {follows}")
            enough = enough and not needed
    shutil.rmtree(place, ignore_errors=True)
    return lines, enough


def open_files() -> int:
    """The hard limit of this process on open files."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
