"""Files and folders that are complete or absent at every moment, their hashes, and lock files."""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import UserError

try:
    import fcntl
except ImportError:
    sys.exit("this program needs Linux or macOS; on Windows, run it in WSL (the optimizers alone run everywhere)")

# a file system that cannot flush the entries of a folder gives one of these errors; all others are real
CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF)
UNFINISHED = "tmp-"  # prefix of the names of folders that are being written or deleted


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_new(path: Path, parts: Iterable[Any]) -> str:
    """Write a file that does not exist, and flush it to the disk. Returns its sha256.

    parts: bytes, arrays or other buffers, one after the other. If writing fails, the file is deleted.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "xb") as f:  # does not follow a link that somebody put there
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a failed write does not name the file
        if not isinstance(error, FileExistsError):
            with suppress(OSError):
                path.unlink()
        raise
    return digest.hexdigest()


def write_durably(path: Path, *parts: Any) -> str:
    """Write a file under a temporary name, flush it to the disk and rename it. Returns its sha256.

    So the old or the new file is complete at every moment. If writing fails, the temporary file is deleted.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    digest = write_new(temporary, parts)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return digest


def write_json(path: Path, content: Any) -> None:
    """Write JSON durably."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path, what: str = "readable as JSON") -> Any:
    """The content of a JSON file. Raises UserError, "PATH: not WHAT", if it holds something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not {what}") from None


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk, so that they survive a power failure, if the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC_FOLDERS:
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def replaced_name(final: Path) -> Path:
    """The hidden name under which a folder waits while a new one takes its place."""
    return final.with_name(f".{final.name}.replaced")


def replace_folder(new: Path, final: Path) -> None:
    """Give a complete folder its final name, in place of a folder that has it.

    Two folders cannot change places in one operation. So the old one waits under a hidden name, and is deleted when
    the new one has its name. What begins with a dot in it may be a user's, and moves to the new one.
    `restore_folder` repairs what an interruption leaves.
    """
    sync_folder(new)
    if final.exists():
        restore_folder(final)
        final.rename(replaced_name(final))
    try:
        new.rename(final)
    except OSError:
        restore_folder(final)
        raise
    sync_folder(final.parent)
    restore_folder(final)


def restore_folder(final: Path) -> None:
    """Finish or undo an interrupted `replace_folder`, so that `final` is the new or the old folder."""
    old = replaced_name(final)
    if old.exists() and not final.exists():
        old.rename(final)
    for path in old.glob(".*"):
        if not (final / path.name).exists():
            path.rename(final / path.name)
    delete_folder(old)


def was_replaced(final: Path) -> bool:
    """Whether an interrupted `replace_folder` left something for `restore_folder` to do."""
    old = replaced_name(final)
    return old.exists() or _doomed(old).exists()


def delete_folder(folder: Path) -> None:
    """Delete a folder, if it exists, so that it is complete or absent under its name at every moment.

    What cannot be deleted stays under a temporary name, because nothing depends on it. The next call deletes it.
    """
    doomed = _doomed(folder)
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _doomed(folder: Path) -> Path:
    """The name of a folder while it is deleted."""
    return folder if folder.name.startswith(UNFINISHED) else folder.with_name(UNFINISHED + folder.name)


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the permissions of new files. Some libraries let only the owner read theirs."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a lock file, and delete it at the end. Raises BlockingIOError if another process has locked it.

    A file system that cannot lock files is used without a lock, and stderr says so, once for each folder.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a link that somebody put there is an error
    handle, is_present = os.open(path, flags, 0o666), False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            error.filename = str(path)
            raise
        except OSError as error:
            _say_unlocked(path.parent, str(error.strerror))
        # the previous owner may have deleted this file after we opened it; then our lock protects nothing
        with suppress(FileNotFoundError):
            is_present = os.path.samestat(os.fstat(handle), path.stat())
        if not is_present:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        try:
            yield
        finally:
            with suppress(OSError):  # an error inside is the one to show
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


@cache
def _say_unlocked(folder: Path, reason: str) -> None:
    problem = f"this file system cannot lock files ({reason})"
    print(f"{folder}: {problem}; do not start the same command twice at a time", file=sys.stderr)


@contextmanager
def lock_of(path: Path) -> Iterator[None]:
    """Lock what several processes write at a path, for example to read and change a file. Waits for the others."""
    start, told = time.monotonic(), False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
                break
            except BlockingIOError:
                time.sleep(0.05)
            if not told and time.monotonic() > start + 10:
                print(f"{path}: waiting for another process that writes it", file=sys.stderr)
                told = True
        yield
