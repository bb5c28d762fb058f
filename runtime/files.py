"""Files that are complete or absent, their hashes, and lock files."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    sys.exit("this program needs Linux or macOS; on Windows, run it in WSL (the optimizers alone run everywhere)")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, *parts: Any) -> str:
    """Write a file under a temporary name, flush it to the disk and rename it. Returns its sha256.

    So the file is complete or absent. If writing fails, the temporary file is deleted.
    """
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as f:
            for part in parts:
                f.write(part)
                digest.update(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # the error of a failed write does not name the file
        raise
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON durably."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a lock file, and delete it at the end. Raises BlockingIOError if another process has locked it."""
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems cannot lock files
                raise
        # a process that ended since `open` has deleted this file, and another one may hold the lock of a new file
        if not path.exists() or not os.path.samestat(os.fstat(f.fileno()), path.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
