"""The processes of a run: rank, device, small exchanges between ranks, and the signals that stop a run.

No other module reads the environment variables of torchrun.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # a collective that takes longer ends the run instead of hanging it
REPEATED = 1.0  # seconds after which another signal counts as a second one


@dataclass
class World:
    """This process among the processes of a run. At size 1 nothing communicates."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # CPU-side group for flags and file bookkeeping

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None on one process."""
        return dist.group.WORLD if self.size > 1 else None

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, item: object) -> list:
        """Every rank's small Python object, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        out: list = [None] * self.size
        dist.all_gather_object(out, item, group=self.control)
        return out

    def from_main(self, item: object) -> object:
        """Rank 0's small Python object, on every rank."""
        return self.gather(item)[0]


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def start_world(device: str) -> Iterator[World]:
    """Join the run that torchrun described, or run alone. device: "auto", "cpu", "cuda" or "cuda:N".

    Raises ValueError if the device does not exist.
    """
    launched = "RANK" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch_device = resolve_device(device, local_rank if launched else None)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if not launched:
        yield World(0, 1, torch_device)
        return
    on_gpu = torch_device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=torch_device if on_gpu else None)
    together = True
    try:
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield World(dist.get_rank(), dist.get_world_size(), torch_device, control)
    except (Exception, KeyboardInterrupt):
        together = not on_gpu
        raise
    finally:
        # NCCL's shutdown waits for all pending collectives. If only this rank has failed, the others never join them,
        # and the shutdown would hang before the error is printed. Ending without it aborts the collectives.
        if together:
            dist.destroy_process_group()


def resolve_device(device: str, local_rank: int | None = None) -> torch.device:
    """Turn a device name into a device that exists; a launcher's local rank picks the GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device="{device}": must be "auto", "cpu", "cuda" or "cuda:N"') from None
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise ValueError(f'device="{device}": must be "auto", "cpu", "cuda" or "cuda:N"')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if local_rank is not None else resolved.index or 0
    if index >= count:
        raise ValueError(
            f'device="{device}": GPU {index} was asked for and torch {torch.__version__} sees {count}; '
            "use --device=cpu, or fewer processes per machine"
        )
    return torch.device("cuda", index)


class Exchange:
    """Combines a yes or no of every rank without waiting for the network.

    Each call of `any` starts an exchange and returns the result of the one that the previous call started, so every
    rank gets the same answer at the same call. Called by every rank at the same points of the program.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def any(self, flag: bool) -> bool | None:
        """Whether a rank said yes at the previous call; None at the first call. On one process: `flag`."""
        if self.world.size == 1:
            return flag
        answer, mine = self.close(), torch.tensor(int(flag))
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self._pending = (work, mine)
        return answer

    def close(self) -> bool | None:
        """Finish the pending exchange; its answer, or None if there is none."""
        if self._pending is None:
            return None
        (work, answer), self._pending = self._pending, None
        work.wait()
        return bool(answer.item())


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 asks the run to finish its step, save and leave. A second signal ends it at once.

    A signal may reach only some ranks, and at different steps. Every rank calls `agreed` once a step: it returns the
    result of the exchange started one step earlier, so all ranks leave at the same step and no step waits for the
    network. A signal that the process ignores, as under nohup, stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: str | None = None  # name of the first signal that reached this rank
        self._received = 0.0  # when it came
        self._exchange = Exchange(world)
        handled = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._receive) for s in handled}

    def _receive(self, number: int, frame: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signal is not None:
            if now - self._received > REPEATED:  # launchers forward a signal that reached the whole group, too
                print(f"{name} again: ends at once, without saving", file=sys.stderr, flush=True)
                os._exit(128 + number)
            return
        if self.world.is_main:
            print(f"{name}: will finish this step, save and stop", file=sys.stderr, flush=True)
        self.signal, self._received = name, now

    def agreed(self) -> bool:
        """Whether all ranks stop here."""
        return bool(self._exchange.any(self.signal is not None))

    def close(self) -> None:
        """Finish the pending exchange and restore the old signal handlers."""
        self._exchange.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore the signals that stop a run. Processes started meanwhile ignore them for good.

    Inductor's compile workers belong to the trainer's process group. If they died of a signal sent to the group, the
    trainer would wait for their results for ever.
    """
    before = {s: signal.signal(s, signal.SIG_IGN) for s in StopRequest.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
