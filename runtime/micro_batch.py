"""How many sequences a process takes at a time, where the config leaves that open: as many as fit its memory."""

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.distributed import World
from runtime.hardware import memory_room
from runtime.preflight import Footprint, memory_need

MARGIN = 0.08  # of a GPU, left free for fragments, communication and the optimizer's scratch (not measured)
CPU_MOST = 8  # sequences: more do not make a CPU faster


@dataclass(frozen=True)
class Choice:
    """A micro-batch and what it needs of what there is, in bytes."""

    micro_batch: int
    accumulation: int
    needed: int
    there: int
    refused: tuple[int, ...] = ()  # larger ones that were tried and ran out of memory

    def __str__(self) -> str:
        text = f"micro-batch {self.micro_batch} x accumulation {self.accumulation}: "
        text += f"about {self.needed / 1e9:.3g} of {self.there / 1e9:.3g} GB"
        return text + (f"; {', '.join(map(str, self.refused))} did not fit" if self.refused else "")


def candidates(share: int, world: World) -> list[int]:
    """The micro-batches that divide a process's `share` of a step, largest first."""
    most = CPU_MOST if world.device.type == "cpu" else share
    return [m for m in range(min(share, most), 0, -1) if share % m == 0]


def estimate(footprint: Footprint, share: int, world: World) -> int:
    """The largest candidate whose memory, as reckoned, fits beside the margin on every rank; 1 if none does.

    Processes on a CPU share its memory.
    """
    room, there = memory_room(world.device)
    room = room - round(MARGIN * there) if world.device.type == "cuda" else room // world.size
    fits = (m for m in candidates(share, world) if memory_need(footprint, m).total <= room)
    return min(world.gather(next(fits, 1)))


def choose(footprint: Footprint, share: int, world: World, attempt: Callable[[int], int]) -> Choice:
    """The largest micro-batch that fits on every rank; called by every rank.

    attempt: takes a micro-batch through forward and backward and returns its bytes at the peak; called in turn
    from the estimate downwards until none of the ranks runs out of memory. On a CPU the estimate stands.
    Raises ValueError if a single sequence does not fit.
    """
    there, start = memory_room(world.device)[1], estimate(footprint, share, world)
    if world.device.type == "cpu":
        return Choice(start, share // start, memory_need(footprint, start).total, there)
    refused = []
    for m in candidates(share, world):
        if m > start:
            continue
        if world.is_main:
            print(f"trying a micro-batch of {m}", file=sys.stderr, flush=True)
        try:
            peak = attempt(m)
        except torch.OutOfMemoryError:  # what the pass held lives until this block ends
            peak = None
        peaks = world.gather(peak)
        if None not in peaks:
            return Choice(m, share // m, max(peaks), there, tuple(refused))
        refused.append(m)
        _free(world.device)
    need = memory_need(footprint, 1).total
    raise ValueError(
        f"out of memory with one sequence at a time: at least {need / 1e9:.1f} GB are needed and the device has "
        f"{there / 1e9:.1f}; use a smaller model or --block_size"
    )


def peak_of_pass(loss: Callable[[], Tensor], parameters: Iterable[Tensor], reserve: int, device: torch.device) -> int:
    """Bytes at the peak of one forward and backward pass of `loss`, with gradients in place as when accumulating.

    reserve: bytes that come into use later, held meanwhile. The margin is held, too, and not part of the answer;
    on a CPU, which keeps no count, the answer is 0. Weights and the random generators are as before, and there are
    no gradients afterwards. Raises torch.OutOfMemoryError if it does not fit.
    """
    parameters, gpu = list(parameters), device.type == "cuda"
    margin = round(MARGIN * memory_room(device)[1]) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        held = torch.empty(reserve + margin, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device] if gpu else []):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            loss().backward()
        peak = torch.cuda.max_memory_allocated(device) - margin if gpu else 0
        del held
    finally:
        for p in parameters:
            p.grad = None
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
    return peak


def _free(device: torch.device) -> None:
    """Give back what a pass left behind, its compiled graph, too, which no other size can use."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
