"""Lets every operation on files fail once, and kills a process before every one of them.

A program that has `faults.c` preloaded repeats an action in forked children; see `every_fault`.
"""

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KILLED, FAILED, DONE = "killed", "failed", "done"


def run_preloaded(program: str, *arguments: str, folder: Path) -> None:
    """Run a Python file with the library preloaded; `folder` is for the library. Fails if the program does."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environ = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, program, *arguments], env=environ, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def every_fault(
    folder: Path, reset: Callable[[], None], action: Callable[[], None], check: Callable[[str], None]
) -> int:
    """Do an action in a child for each operation that it does below `folder`, and each kind of fault.

    reset: puts the folder into its first state. check: called in this process after each fault with what became of the
    action; it must raise if something is lost. Returns the number of operations.
    """
    reset()
    operations = _attempt(folder, action, 0, 0)[1]
    assert operations > 0
    for number in range(1, operations + 1):
        for error in (0, errno.EIO, errno.ENOSPC):
            reset()
            outcome, _ = _attempt(folder, action, number, error)
            assert (outcome == KILLED) == (error == 0), f"operation {number}: {outcome}"
            try:
                check(outcome)
            except Exception as problem:
                name = errno.errorcode.get(error, "SIGKILL")
                raise AssertionError(f"operation {number} of {operations}, {name}, {outcome}: {problem!r}") from problem
    return operations


def _attempt(folder: Path, action: Callable[[], None], number: int, error: int) -> tuple[str, int]:
    """The outcome of the action in a child, and the number of operations that it did."""
    library = ctypes.CDLL(None)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        library.faults_arm(os.fsencode(folder), ctypes.c_long(number), error)
        code = 0
        try:
            action()
        except Exception:
            code = 1
        os.write(writing, str(library.faults_count()).encode())
        os._exit(code)
    os.close(writing)
    with open(reading) as f:
        count = int(f.read() or 0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 1), "the action ended its process"
    return KILLED if os.WIFSIGNALED(status) else FAILED if os.WEXITSTATUS(status) else DONE, count
