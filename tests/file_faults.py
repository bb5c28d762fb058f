"""Errors and kills before each file operation of a function, in forked processes."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir")  # functions of os whose first argument is a path


class _File:
    """An open file whose writes are operations."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self.file, self.before = file, before

    def write(self, data: Any) -> int:
        self.before()
        return self.file.write(data)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _inject(folder: Path, number: int, fault: str) -> list[int]:
    """Patch this process: before operation `number` below a folder comes the fault, "ENOSPC" or "SIGKILL".

    Returns the number of operations so far, which keeps counting.
    """
    done = [0]

    def before() -> None:
        done[0] += 1
        if done[0] == number and fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if done[0] == number:
            code = getattr(errno, fault)
            raise OSError(code, os.strerror(code))

    def is_inside(path: object, options: dict) -> bool:
        if options.get("dir_fd") is not None or options.get("src_dir_fd") is not None:  # shutil.rmtree
            return True
        return isinstance(path, str | Path) and folder in Path(os.path.abspath(path)).parents

    def changing(function: Callable) -> Callable:
        def patched(path: Any, *args: Any, **options: Any) -> Any:
            if is_inside(path, options):
                before()
            return function(path, *args, **options)

        return patched

    real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync

    def patched_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not (is_inside(path, {}) and set(mode) & set("wax+")):
            return real_open(path, mode, *args, **options)
        before()
        return _File(real_open(path, mode, *args, **options), before)

    def patched_os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if is_inside(path, {}) and flags & os.O_CREAT:
            before()
        return real_os_open(path, flags, *args, **options)

    def patched_fsync(handle: int) -> None:
        before()
        real_fsync(handle)

    builtins.open = io.open = patched_open  # type: ignore[assignment]
    os.open, os.fsync = patched_os_open, patched_fsync  # type: ignore[assignment]
    for name in CHANGES:
        setattr(os, name, changing(getattr(os, name)))
    return done


def ended_with(action: Callable[[], Any], folder: Path, number: int, fault: str) -> str:
    """Run an action in a forked process with a fault before its operation `number` below a folder.

    Returns "done" if there are fewer operations, "survived" if the action did not mind, "error" if it raised, "killed".
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent do not exist here
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            done = _inject(folder, number, fault)
            action()
            status = 2 if done[0] >= number > 0 else 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    return ("done", "error", "survived")[os.WEXITSTATUS(status)]
