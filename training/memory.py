"""Memory of a training process: an estimate, and the largest micro-batch that fits."""

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.command import is_out_of_memory
from runtime.distributed import World
from runtime.errors import UserError
from runtime.hardware import available_memory

ERROR = 0.05  # fraction by which an estimate may be too high; bench.gpu found at most 0.02
MARGIN = 0.08  # fraction of a GPU's memory that stays unused, for fragments, communication and scratch memory
CPU_MOST = 8  # sequences; a CPU is not faster with a larger micro-batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at least; fragments and the kernels' scratch memory are not included."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # per sequence of a micro-batch
    most: int = sys.maxsize  # largest micro-batch that may be chosen

    def total(self, micro_batch: int) -> int:
        return self.weights + self.gradients + self.optimizer + micro_batch * self.activations


@dataclass(frozen=True)
class MicroBatch:
    """A selected micro-batch, the bytes it needs, and the bytes that the device has."""

    size: int
    needed: int
    total: int
    failed: tuple[int, ...] = ()  # larger sizes that ran out of memory

    def __str__(self) -> str:
        text = f"micro-batch {self.size}: about {self.needed / 1e9:.3g} of {self.total / 1e9:.3g} GB"
        return text + (f"; {', '.join(map(str, self.failed))} did not fit" if self.failed else "")


def divisors(total: int, most: int) -> list[int]:
    """The divisors of `total` that are at most `most`, largest first."""
    return [d for d in range(min(total, most), 0, -1) if total % d == 0]


def estimated_micro_batch(need: MemoryEstimate, per_process: int, world: World, memory: tuple[int, int]) -> int:
    """The largest micro-batch that fits on every rank by the estimate; 1 if none fits.

    per_process: sequences per step of one process; the micro-batch divides it.
    memory: bytes that are available, and bytes that the device has. All processes of a CPU use the same memory.
    """
    return min(world.gather(largest_fitting(need, per_process, world, memory)))


def largest_fitting(need: MemoryEstimate, per_process: int, world: World, memory: tuple[int, int]) -> int:
    """The largest micro-batch that fits by the estimate on this rank; 1 if none fits."""
    sizes = divisors(per_process, min(need.most, per_process if world.device.type == "cuda" else CPU_MOST))
    room = _room(world, memory)
    return next((m for m in sizes if need.total(m) <= room), 1)


def _room(world: World, memory: tuple[int, int]) -> int:
    """Bytes that one process may use."""
    available, total = memory
    return available - round(MARGIN * total) if world.device.type == "cuda" else available // world.local_size


def first_attempt(need: MemoryEstimate, estimate: int, per_process: int, world: World, memory: tuple[int, int]) -> int:
    """The size to try first: the next one above the estimate, if it fits on every rank with ERROR more room.

    Otherwise it is the estimate. An attempt that fails costs a compilation, which takes minutes for the large sizes.
    """
    above = ([estimate] + [m for m in divisors(per_process, min(need.most, per_process)) if m > estimate])[-1]
    fits = need.total(above) <= (1 + ERROR) * _room(world, memory)
    return above if all(world.gather(fits)) else estimate


def choose_micro_batch(
    need: MemoryEstimate, per_process: int, world: World, attempt: Callable[[int], int] | None
) -> MicroBatch:
    """The largest micro-batch that fits on every rank: estimated on a CPU, measured on a GPU. Every rank must call it.

    per_process: sequences per step of one process. attempt: see `measured_micro_batch`; None: estimate on a GPU, too.
    Raises UserError if a single sequence does not fit.
    """
    memory = available_memory(world.device)
    estimate = estimated_micro_batch(need, per_process, world, memory)
    if world.device.type == "cpu" or attempt is None:
        return MicroBatch(estimate, need.total(estimate), memory[1])
    world.sum(torch.zeros(1, device=world.device))  # communication allocates its memory before the attempts
    first = first_attempt(need, estimate, per_process, world, memory)
    return measured_micro_batch(per_process, first, world, memory[1], attempt)


def measured_micro_batch(
    per_process: int, first: int, world: World, total: int, attempt: Callable[[int], int]
) -> MicroBatch:
    """The largest micro-batch, from `first` downwards, whose attempt succeeds on every rank. Every rank must call it.

    attempt: runs forward and backward with a micro-batch and returns the bytes at the peak. total: bytes that the
    device has. Raises UserError if a single sequence does not fit.
    """
    failed: list[int] = []
    for m in divisors(per_process, first):
        if world.is_main:
            print(f"trying a micro-batch of {m}", file=sys.stderr, flush=True)
        try:
            peak: int | None = attempt(m)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            peak = None
        peaks = [p for p in world.gather(peak) if p is not None]
        if len(peaks) == world.size:
            torch.cuda.empty_cache()  # gives the margin back to communication and cuBLAS
            return MicroBatch(m, max(peaks), total, tuple(failed))
        failed.append(m)
        torch.compiler.reset()  # no other size can use the graph that was compiled for this one
        gc.collect()
        torch.cuda.empty_cache()
    raise UserError(
        f"out of memory with one sequence at a time on a device of {total / 1e9:.1f} GB; use a smaller model or "
        "--block_size; --preflight estimates the memory"
    )


def peak_of_pass(loss: Callable[[], Tensor], parameters: Iterable[Tensor], reserve: int, device: torch.device) -> int:
    """Bytes at the peak of two forward and backward passes of `loss`; 0 on a CPU, where nothing counts them.

    As in a step with gradient accumulation, the first pass allocates the gradients and the second adds to them. On a
    GPU the gradients may occupy parts of the large blocks that the first pass frees, and the second pass needs others.
    `reserve` bytes and the margin are occupied during the passes: the reserve is for memory that is used later, such
    as optimizer state that is not allocated yet. The answer includes the reserve and not the margin.
    Weights and random generators are unchanged afterwards, and gradients are None, or 0 if they were not None.
    Raises torch.OutOfMemoryError if the passes do not fit.
    """
    gradients, gpu = [(p, p.grad) for p in parameters], device.type == "cuda"
    margin = round(MARGIN * available_memory(device)[1]) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        occupied = torch.empty(reserve + margin, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device] if gpu else []):
            for _ in range(2):
                loss().backward()
        del occupied
        return torch.cuda.max_memory_allocated(device) - margin if gpu else 0
    finally:
        for p, before in gradients:
            p.grad = before.zero_() if before is not None else None
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
