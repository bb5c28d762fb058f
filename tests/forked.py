"""Processes that are forked from one that has imported the trainer. A start of Python with torch takes 4 seconds."""

import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
SERVER, CHILD = multiprocessing.get_context("forkserver"), multiprocessing.get_context("fork")
IMPORTED = ["conftest", "torch._dynamo", "torch.distributed.checkpoint.state_dict"]


class Forked:
    """A function at work in one process, or in several that find each other like those of torchrun.

    Its methods are those of a Popen with one pipe for all output. Several processes have a parent, which ends all of
    them if one fails; its id is `pid`, and they notice its end.
    """

    def __init__(self, body: Callable[..., None], *arguments: object, processes: int = 1) -> None:
        SERVER.set_forkserver_preload(IMPORTED)
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # else the server does not find what it shall import
        with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        self._output, writing = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=_start, args=(writing, body, arguments, processes))
        self._process.start()
        writing.close()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for the end of all processes; returns what they printed."""
        printed, end = b"", time.monotonic() + timeout
        while select.select([self._output], [], [], max(0, end - time.monotonic()))[0]:
            if not (part := os.read(self._output.fileno(), 65536)):
                self._process.join()
                return printed.decode(), None
            printed += part
        os.killpg(self.pid, signal.SIGKILL)
        raise TimeoutError(f"no end after {timeout} seconds; printed so far:\n{printed.decode()}")


def _start(output: Connection, body: Callable[..., None], arguments: tuple, processes: int) -> None:
    os.setsid()  # a signal to this group reaches every process
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.chdir(ROOT)
    if processes == 1:
        body(*arguments)
        return
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    world = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    world |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)  # the parent has the store
    ranks = [CHILD.Process(target=_rank, args=(rank, world, body, arguments)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    while (running := [rank for rank in ranks if rank.is_alive()]) and not any(rank.exitcode for rank in ranks):
        wait([rank.sentinel for rank in running])
    failed = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    end = time.monotonic() + 10
    for rank in running:
        rank.terminate()
    for rank in running:
        rank.join(max(0, end - time.monotonic()))
        rank.kill()
    del store
    sys.exit(failed)


def _rank(rank: int, world: dict[str, object], body: Callable[..., None], arguments: tuple) -> None:
    os.environ.update({key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    body(*arguments)
