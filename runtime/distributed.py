"""The processes of a run: rank, device, small exchanges between ranks, and the signals that stop a run.

Only this module and runtime/command.py read the environment variables of torchrun.
"""

import ctypes
import itertools
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.command import first_line, is_out_of_memory
from runtime.errors import UserError

T = TypeVar("T")
# Seconds that ranks wait for each other, for example while one writes a checkpoint. After that the run ends with an
# error. Exchanges on the CPU time out before those of NCCL, because NCCL ends the process without an explanation.
PATIENCE = float(os.environ.get("RANKS_WAIT_SECONDS", "540"))
TIMEOUT, NCCL_TIMEOUT = timedelta(seconds=PATIENCE), timedelta(seconds=PATIENCE + 30)
BEAT = 2.0  # seconds between two heartbeats of a rank
REPEATED = 1.0  # seconds during which repeats of a signal are ignored; launchers send it twice


@dataclass
class World:
    """This process and the other processes of a run. With one process, all exchanges are local."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo group for Python objects and flags in CPU memory
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return self.control is not None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None with one process."""
        return dist.group.WORLD if self.size > 1 else None

    def subgroup(self, lists: list[list[int]]) -> dist.ProcessGroup:
        """The process group of the list of ranks that has this one. Every rank must call it, with equal lists."""
        timeout = NCCL_TIMEOUT if self.device.type == "cuda" else TIMEOUT
        return dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0]

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, item: T) -> list[T]:
        """The small Python objects of all ranks, in rank order. Every rank gets the list."""
        if self.size == 1:
            return [item]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, item, group=self.control)
        return out

    def from_main(self, item: T) -> T:
        """The small Python object of rank 0. Every rank gets it."""
        return self.gather(item)[0]

    def raise_first(self, error: Exception | None) -> None:
        """Raise, on every rank, the error of the first rank that has one."""
        for found in filter(None, self.gather(error)):
            raise found

    def say(self, text: str) -> None:
        """Print a line once."""
        if self.is_main:
            print(text, flush=True)


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def start_world(device: str) -> Iterator[World]:
    """Join the run that torchrun started, or run as one process. device: "auto", "cpu", "cuda" or "cuda:N".

    Raises UserError if the device does not exist.
    """
    launched = "RANK" in os.environ
    torch_device = resolve_device(device, int(os.environ.get("LOCAL_RANK", 0)) if launched else None)
    on_gpu = torch_device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that autocast leaves in float32
    if not launched:
        yield World(0, 1, torch_device)
        return
    _stop_with_launcher()
    backend, timeout = ("nccl", NCCL_TIMEOUT) if on_gpu else ("gloo", TIMEOUT)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=torch_device if on_gpu else None)
    except dist.DistError as error:
        check = "check MASTER_ADDR, MASTER_PORT and the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        raise UserError(f"the processes of this run did not find each other ({first_line(error)}); {check}") from None
    rank, size, shut_down = dist.get_rank(), dist.get_world_size(), True
    roll = Roll(rank, size)
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield World(rank, size, torch_device, control, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    except (Exception, KeyboardInterrupt) as error:
        # NCCL's shutdown waits for all pending collectives. If only this rank has failed, the others never join them,
        # and the shutdown would hang before the error is printed. Ending the process aborts the collectives.
        shut_down = not on_gpu
        if not _is_of_collective(error):
            raise
        shut_down = False
        raise LostRankError(roll.missing()) from error
    finally:
        roll.close()
        if shut_down:
            dist.destroy_process_group()


def _is_of_collective(error: BaseException) -> bool:
    """Whether an error says that a collective failed or timed out."""
    failed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return failed and not is_out_of_memory(error)


class LostRankError(UserError):
    """Another rank does not answer any more."""


class Roll:
    """Heartbeats of all ranks, in the key-value store of their rendezvous.

    A thread of each rank writes them. They show which rank was killed or stopped, or lost its machine. The failed
    collective itself does not say which rank is missing.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store = dist.PrefixStore("roll", dist.distributed_c10d._get_default_store())
        self.store.set(f"name/{rank}", f"rank {rank} (process {os.getpid()} on {platform.node()})")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the machine of the store is lost
            for number in itertools.count():
                self.store.set(f"beat/{self.rank}", str(number))
                if self._closed.wait(BEAT):
                    return

    def _read(self, key: str) -> list[bytes | None]:
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        return [self.store.get(key) if self.store.check([key]) else None for key in keys]

    def missing(self) -> str:
        """A message that names the ranks without heartbeats; if all have them, those that are not in the collective."""
        again = "the same command continues from the last checkpoint"
        try:
            self.store.set(f"waits/{self.rank}", "yes")
            before = self._read("beat")
            time.sleep(3 * BEAT)
            found = zip(self._read("name"), before, self._read("beat"), self._read("waits"), strict=True)
        except RuntimeError:
            where = os.environ.get("MASTER_ADDR", "the first machine")
            return f"the processes on {where} cannot be reached any more; {again}"
        ranks = [(name or b"a rank", beat != later, waits) for name, beat, later, waits in found]
        lost = [name for name, alive, _ in ranks if not alive] or [name for name, _, waits in ranks if not waits]
        names = b", ".join(lost[:8]).decode() or "a rank"
        return f"{names}{' and others' if len(lost) > 8 else ''}: no answer; {again}"

    def close(self) -> None:
        self._closed.set()
        self._thread.join(10)  # torch aborts a process that exits while a thread is inside torch


def _stop_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the parent process dies, so that a killed launcher leaves no processes behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def resolve_device(device: str, local_rank: int | None = None) -> torch.device:
    """The torch device of a device name. With a local rank, the rank selects the GPU, unless the process sees only one.

    Raises UserError if the device does not exist, and for "auto" if the machine has a GPU that torch cannot use.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and (gpus := _unusable_gpus()):
            raise UserError(
                f'device="auto": nvidia-smi lists "{gpus[0]}", but torch {torch.__version__} cannot use it. Usually '
                f"the driver is too old for CUDA {torch.version.cuda}: update it, or install an older build of torch; "
                "--device=cpu trains without the GPU"
            )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f'device="{device}": must be "auto", "cpu", "cuda" or "cuda:N"')
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return resolved
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if local_rank is not None else resolved.index or 0
    if local_rank is not None and count == 1:  # some schedulers show each process a GPU of its own, as number 0
        index = 0
    if index >= count:
        raise UserError(
            f'device="{device}": GPU {index} was asked for, but torch {torch.__version__} sees {count}; '
            "use --device=cpu, or fewer processes per machine"
        )
    return torch.device("cuda", index)


def _unusable_gpus() -> list[str]:
    """The GPUs that the driver lists for a CUDA build of torch that sees none; empty if the user has hidden them."""
    if torch.version.cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]


class DelayedAny:
    """Tells all ranks whether any of them said yes, without waiting for the network.

    Each call of `any` starts an exchange and returns the result of the previous one. So every rank gets the same
    answer at the same call. Every rank must call it at the same points of the program.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def any(self, flag: bool) -> bool | None:
        """Whether a rank passed True at the previous call; None at the first call. With one process: `flag`."""
        if self.world.size == 1:
            return flag
        answer, value = self.close(), torch.tensor(int(flag))
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self._pending = (work, value)
        return answer

    def close(self) -> bool | None:
        """Finish the pending exchange and return its answer; None if there is none."""
        if self._pending is None:
            return None
        (work, answer), self._pending = self._pending, None
        work.wait()
        return bool(answer.item())


class StopRequest:
    """Lets a signal stop the run after its step and a save. A second signal ends it at once.

    Before the first step there is nothing to save, and compiling can take minutes. Until `let_steps_finish` is called,
    the first signal ends the process at once, too.

    SIGHUP comes when a terminal is closed or a connection is lost.

    A signal may reach only some ranks, at different steps. Every rank calls `agreed` once a step. It returns the
    result of the exchange that the previous step started, so all ranks stop at the same step and no step waits for
    the network. A signal that the process ignores, as under nohup, stays ignored.

    A thread of its own listens, so a second signal ends the process while the main thread waits in a library, too.
    The main thread blocks the signals, and the programs that it starts inherit that. So a signal to the whole process
    group does not kill a C++ compiler whose result the step needs.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: str | None = None  # name of the first signal that reached this rank
        self._received = 0.0  # time of that signal
        self._steps_finish = False
        self._exchange = DelayedAny(world)
        handled = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._handlers_before = {s: signal.signal(s, lambda number, frame: None) for s in handled}
        numbers, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup)
        threading.Thread(target=self._listen, args=(numbers,), daemon=True).start()
        self._blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)

    def _listen(self, numbers: int) -> None:
        with open(numbers, "rb", buffering=0) as arriving:
            while number := arriving.read(1):
                if number[0] in self._handlers_before:
                    self._receive(number[0])

    def _receive(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._steps_finish:
            self._say(f"{name}: received before the first step; nothing to save, exiting")
            os._exit(128 + number)
        if self.signal is None:
            self._say(f"{name}: will finish this step, save and stop")
            self.signal, self._received = name, now
        elif now - self._received > REPEATED:  # a launcher may send the same signal to each process a second time
            self._say(f"{name} again: exits now, without saving")
            os._exit(128 + number)

    def _say(self, message: str) -> None:
        if self.world.is_main:
            with suppress(OSError):  # a closed terminal cannot be written to, and the run must still save
                print(message, file=sys.stderr, flush=True)

    def let_steps_finish(self) -> None:
        """From the first call on, a signal lets the run finish its step and save. Every rank calls it after a step."""
        if not self._steps_finish:
            self.world.gather(None)  # if one rank ended at once while another saved, the save would fail
            self._steps_finish = True

    def agreed(self, also: bool = False) -> bool:
        """Whether all ranks stop now. also: this rank must stop for another reason than a signal."""
        return bool(self._exchange.any(also or self.signal is not None))

    def close(self, wait: bool = True) -> None:
        """Restore the previous signal handlers. wait: finish the pending exchange first; False if a rank has failed."""
        if wait:
            self._exchange.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)  # the thread ends


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore the signals that stop a run. Processes that are started meanwhile ignore them permanently.

    Inductor's compile workers belong to the trainer's process group. If a signal to the group killed them, the
    trainer would wait for their results for ever.
    """
    before = {s: signal.signal(s, signal.SIG_IGN) for s in StopRequest.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
