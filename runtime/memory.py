"""Memory of a training process: an estimate, and the largest micro-batch that fits."""

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.command import is_out_of_memory
from runtime.distributed import World
from runtime.hardware import available_memory

MARGIN = 0.08  # of a GPU, left free for fragments, communication and the optimizer's scratch (not measured)
CPU_MOST = 8  # sequences: more do not make a CPU faster


@dataclass(frozen=True)
class Footprint:
    """The facts that decide the memory of one training process, apart from the micro-batch."""

    params: int
    state: int  # bytes of optimizer state in this process
    layers: int
    width: int
    vocab: int  # padded
    block: int  # tokens of a sequence
    bf16: bool  # autocast
    residual: int  # bytes of a number in the residual stream
    recompute: bool  # activation checkpointing
    processes: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one process needs at least; fragments and the kernels' scratch memory come on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_need(of: Footprint, micro_batch: int) -> MemoryNeed:
    """Memory of one process in training.

    Per token and layer, backward keeps with fused attention and no dropout, in elements of the width C: the inputs of
    the two norms (2), their outputs (2), q k v (3), attention's output (1), the MLP's hidden layer before and after
    gelu (8). That is 16 x 4 bytes in float32. In bf16 the residual stream, which the norms read, may stay float32:
    2 x 4 + 14 x 2. Activation checkpointing keeps the block's input, and one block as above. Per token the logits,
    their gradient and the loss's float32 copy: V x (4 + 4 + 4) or V x (2 + 2 + 4) bytes.
    """
    element, logits = (2, 8) if of.bf16 else (4, 12)
    block = 2 * of.residual + 14 * element
    blocks = of.residual * of.layers + block if of.recompute else block * of.layers
    activations = micro_batch * of.block * (blocks * of.width + logits * of.vocab)
    weights = of.params * (6 if of.bf16 else 4)  # autocast keeps a bf16 copy of the weights
    gradients = 4 * of.params * (2 if of.processes > 1 else 1)  # accumulated ones, and the buckets of the all-reduce
    return MemoryNeed(weights, gradients, of.state, activations)


@dataclass(frozen=True)
class MicroBatch:
    """A chosen micro-batch, and the memory it needs of what there is, in bytes."""

    size: int
    accumulation: int
    needed: int
    available: int
    failed: tuple[int, ...] = ()  # larger ones that were tried and ran out of memory

    def __str__(self) -> str:
        text = f"micro-batch {self.size} x accumulation {self.accumulation}: "
        text += f"about {self.needed / 1e9:.3g} of {self.available / 1e9:.3g} GB"
        return text + (f"; {', '.join(map(str, self.failed))} did not fit" if self.failed else "")


def candidates(share: int, world: World) -> list[int]:
    """The micro-batches that divide a process's `share` of a step, largest first."""
    most = CPU_MOST if world.device.type == "cpu" else share
    return [m for m in range(min(share, most), 0, -1) if share % m == 0]


def estimated_micro_batch(footprint: Footprint, share: int, world: World) -> int:
    """The largest candidate whose estimate fits beside the margin on every rank; 1 if none does.

    Processes on a CPU share its memory.
    """
    room, total = available_memory(world.device)
    room = room - round(MARGIN * total) if world.device.type == "cuda" else room // world.size
    fits = (m for m in candidates(share, world) if memory_need(footprint, m).total <= room)
    return min(world.gather(next(fits, 1)))


def choose_micro_batch(footprint: Footprint, share: int, world: World, attempt: Callable[[int], int]) -> MicroBatch:
    """The largest micro-batch that fits on every rank; called by every rank.

    attempt: runs forward and backward with a micro-batch and returns the bytes at the peak. On a GPU it is called
    from one candidate above the estimate downwards until no rank runs out of memory. On a CPU the estimate is taken.
    Raises ValueError if a single sequence does not fit.
    """
    total, estimate = available_memory(world.device)[1], estimated_micro_batch(footprint, share, world)
    if world.device.type == "cpu":
        return MicroBatch(estimate, share // estimate, memory_need(footprint, estimate).total, total)
    if torch.cuda.is_available():
        world.sum(torch.zeros(1, device=world.device))  # communication takes its memory before the trials
    larger = [m for m in candidates(share, world) if m > estimate][-1:]
    failed: list[int] = []
    for m in larger + [m for m in candidates(share, world) if m <= estimate]:
        if world.is_main:
            print(f"trying a micro-batch of {m}", file=sys.stderr, flush=True)
        try:
            peak: int | None = attempt(m)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            peak = None
        peaks = world.gather(peak)
        if None not in peaks:
            torch.cuda.empty_cache()  # frees the margin for communication and cuBLAS
            return MicroBatch(m, share // m, max(peaks), total, tuple(failed))
        failed.append(m)
        _release(world.device)
    need = memory_need(footprint, 1).total
    raise ValueError(
        f"out of memory with one sequence at a time: at least {need / 1e9:.1f} GB are needed and the device has "
        f"{total / 1e9:.1f}; use a smaller model or --block_size"
    )


def peak_of_pass(loss: Callable[[], Tensor], parameters: Iterable[Tensor], reserve: int, device: torch.device) -> int:
    """Bytes at the peak of one forward and backward pass of `loss`, with gradients in place as when accumulating.

    reserve: bytes that will be used later, such as optimizer state that is not allocated yet; they are occupied during
    the pass. The margin is occupied, too, and not part of the answer. On a CPU, which keeps no count, the answer is 0.
    Weights and random generators are as before, and there are no gradients afterwards.
    Raises torch.OutOfMemoryError if it does not fit.
    """
    parameters, gpu = list(parameters), device.type == "cuda"
    margin = round(MARGIN * available_memory(device)[1]) if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        occupied = torch.empty(reserve + margin, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device] if gpu else []):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            loss().backward()
        peak = torch.cuda.max_memory_allocated(device) - margin if gpu else 0
        del occupied
    finally:
        for p in parameters:
            p.grad = None
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
    return peak


def _release(device: torch.device) -> None:
    """Give back what a trial left behind, including its compiled graph, which no other size can use."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
