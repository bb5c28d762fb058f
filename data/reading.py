"""Reading parts of many large files, some of them on drives of a network."""

import errno
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from runtime.errors import UserError

WAITS = (0.1, 1.0, 3.0)  # seconds before a file that could not be read is read again
MOST_FILES = 1 << 16  # more bring nothing, and some programs close every file number up to the limit


class DataError(UserError):
    """A dataset that cannot be used. The message names the file and says what to do."""


class OpenFiles:
    """Files that stay open between reads: at most a quarter of those that the process may open.

    If there are more, the least recently used one is closed.
    """

    def __init__(self) -> None:
        self.files: dict[Path, BinaryIO] = {}  # in the order of their last use
        self.lock, self.most = Lock(), 0

    def get(self, path: Path) -> BinaryIO:
        """An open file. It stays open while a caller holds it, even after it is dropped here."""
        with self.lock:
            file = self.files.pop(path, None) or self._opened(path)
            self.files[path] = file
            return file

    def drop(self, path: Path) -> None:
        """Close a file, so that the next read opens it again."""
        with self.lock:
            self.files.pop(path, None)

    def _opened(self, path: Path) -> BinaryIO:
        self.most = self.most or max(1, _raised_limit() // 4)
        while True:
            while len(self.files) >= self.most:
                self._drop_oldest()
            try:
                return open(path, "rb", buffering=0)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.files:
                    raise
            self._drop_oldest()  # other parts of the program have opened many files

    def _drop_oldest(self) -> None:
        del self.files[next(iter(self.files))]


FILES = OpenFiles()


def _raised_limit() -> int:
    """The limit of this process on open files, after raising it as far as the system allows."""
    import resource  # not on Windows, where runtime.files says in one line that this program needs WSL

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (MOST_FILES if limit == resource.RLIM_INFINITY else limit for limit in limits)
    for more in (min(hard, MOST_FILES), 10240):  # macOS may state no limit and still refuse more than 10240
        if more > soft:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, limits[1]))
                return more
    return soft


def read_at(path: Path, place: int, out: memoryview, waits: Sequence[float] = WAITS) -> int:
    """Read bytes of a file into out, from byte `place` on. Returns their number, smaller only at the end of the file.

    waits: seconds before each retry. Errors of a network drive often pass, so a retry opens and reads the file again.
    After the last one, raises DataError with the name of the file and the reason.
    Each read is a system call of its own. A memory map would count every page it ever read as resident memory.
    """
    done, pauses = 0, iter(waits)
    while done < len(out):
        try:
            file = FILES.get(path)  # keeps it open, if another thread drops it
            got = os.preadv(file.fileno(), (out[done:],), place + done)
            if not got:
                if os.fstat(file.fileno()).st_size <= place + done:
                    break
                raise OSError(errno.EIO, "the file system returned no bytes")
            done += got
        except OSError as error:
            FILES.drop(path)
            pause = next(pauses, None)
            if pause is None:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from None
            time.sleep(pause)
    return done
