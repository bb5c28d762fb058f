"""A process group on a CPU whose links have a stated rate, for DistributedDataParallel and for the optimizers.

All-reduce and all-gather are rings of gloo messages, one collective after the other on a thread of their own, as on
a GPU's communication stream. A message takes at least its bytes / rate. So traffic, order and overlap are those of
the algorithms, and only the speed of the wire is made up. Needs no rights on the machine.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(dist.Work):
    """A collective under way on the link's thread."""

    def __init__(self, future: torch.futures.Future) -> None:
        super().__init__()
        self.future = future

    def wait(self, timeout: object = None) -> bool:
        self.future.wait()
        return True

    def get_future(self) -> torch.futures.Future:
        return self.future


class ThrottledGroup(dist.ProcessGroup):
    """gloo, with all-reduce and all-gather as rings over links of `rate` bytes/s in each direction."""

    def __init__(self, inner: dist.ProcessGroup, rate: float) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner, self.rate = inner, rate
        self.link = ThreadPoolExecutor(1)

    def getBackendName(self) -> str:
        return "throttled"

    def broadcast(self, tensors: list[Tensor], opts: object) -> dist.Work:
        return self.inner.broadcast(tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> dist.Work:
        return self.inner.allgather(outputs, inputs, opts or dist.AllgatherOptions())

    def barrier(self, opts: object = None) -> dist.Work:
        return self.inner.barrier(opts or dist.BarrierOptions())

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> dist.Work:
        return self._start(self._ring_sum, tensors)

    def all_gather_single(self, output: Tensor, mine: Tensor, opts: object = None) -> dist.Work:
        return self._start(self._ring_gather, [output], mine)

    _allgather_base = all_gather_single  # its name before torch 2.13

    def _start(self, collective: Callable, tensors: list[Tensor], *arguments: Tensor) -> Pending:
        future = torch.futures.Future()

        def run() -> None:
            try:
                collective(*tensors, *arguments)
                future.set_result(tensors)
            except Exception as error:
                future.set_exception(error)

        self.link.submit(run)
        return Pending(future)

    def _pass_on(self, parts: list[Tensor], step: int, receive: Tensor) -> int:
        """Send a part to the right, receive one from the left, no faster than the link; returns the part's number."""
        start, rank, size = time.perf_counter(), self.rank(), self.size()
        part = parts[(rank - step) % size]
        work = [self.inner.recv([receive], (rank - 1) % size, 0), self.inner.send([part], (rank + 1) % size, 0)]
        for w in work:
            w.wait()
        time.sleep(max(0.0, part.nbytes / self.rate - (time.perf_counter() - start)))
        return (rank - step - 1) % size

    def _ring_sum(self, x: Tensor) -> None:
        size = self.size()
        padded = torch.zeros(-(-x.numel() // size) * size, dtype=x.dtype)
        padded[: x.numel()] = x.flatten()
        parts = list(padded.chunk(size))
        received = torch.empty_like(parts[0])
        for step in range(size - 1):
            parts[self._pass_on(parts, step, received)].add_(received)
        for step in range(-1, size - 2):
            parts[self._pass_on(parts, step, received)].copy_(received)
        x.copy_(padded[: x.numel()].view_as(x))

    def _ring_gather(self, output: Tensor, mine: Tensor) -> None:
        parts = list(output.view(self.size(), -1).unbind())
        received = torch.empty_like(parts[0])
        parts[self.rank()].copy_(mine.flatten())
        for step in range(self.size() - 1):
            parts[self._pass_on(parts, step, received)].copy_(received)


def start_throttled(rank: int, size: int, rate: float, store: str) -> None:
    """Make a throttled group the default process group; `store` is a file that the ranks share."""

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ThrottledGroup:
        return ThrottledGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rate)

    dist.Backend.register_backend("throttled", create, devices=["cpu"])
    dist.init_process_group("throttled", init_method=f"file://{store}", rank=rank, world_size=size)
