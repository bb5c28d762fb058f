"""What a run will need, reckoned before it starts: memory, disk, time, and whether the ranks reach each other."""

import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.checkpoint import CheckpointConfig
from runtime.distributed import World


@dataclass(frozen=True)
class Footprint:
    """What the memory of one process in training depends on, besides the micro-batch."""

    params: int
    state: int  # bytes of optimizer state in this process
    layers: int
    width: int
    vocab: int  # padded
    block: int  # tokens of a sequence
    half: bool  # bf16 autocast
    stream: int  # bytes of a number in the residual stream
    recompute: bool  # activation checkpointing
    processes: int


@dataclass(frozen=True)
class Plan:
    """What the reckoning needs to know of a run."""

    name: str
    folder: Path
    footprint: Footprint
    whole_state: int  # bytes of optimizer state over all processes
    sequences: int  # of a step, over all processes
    micro_batch: int
    estimated: bool  # the micro-batch is what should fit; a start of the run finds out
    steps: int
    epochs: float  # passes over the training split
    dataset: str
    train_tokens: int
    shards: str | None  # what is wrong with the shards
    checked: str  # how they were checked
    checkpoint: CheckpointConfig
    rate: float | None  # tokens/s over all processes


@dataclass(frozen=True)
class Need:
    """Bytes that one process needs at the least; what the allocator and the kernels' scratch add comes on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_need(of: Footprint, micro_batch: int) -> Need:
    """Memory of one process in training.

    Per token and layer, what backward keeps with fused attention and no dropout, in elements of the width C:
    inputs of the two norms (2), their outputs (2), q k v (3), attention's output (1), the MLP's hidden layer
    before and after gelu (8): 16 x 4 bytes in float32. In bf16 the residual stream, which the norms read, may stay
    float32: 2 x 4 + 14 x 2. Activation checkpointing keeps the block's input, and one block as above. Per token the
    logits, their gradient and the loss's float32 copy: V x (4 + 4 + 4) or V x (2 + 2 + 4) bytes.
    """
    element, logits = (2, 8) if of.half else (4, 12)
    block = 2 * of.stream + 14 * element
    blocks = of.stream * of.layers + block if of.recompute else block * of.layers
    activations = micro_batch * of.block * (blocks * of.width + logits * of.vocab)
    weights = of.params * (6 if of.half else 4)  # autocast keeps a bf16 copy of the weights
    gradients = 4 * of.params * (2 if of.processes > 1 else 1)  # accumulated, and the buckets they are exchanged in
    return Need(weights, gradients, of.state, activations)


def checkpoints_kept(steps: int, every: int, keep: int, milestone_every: int) -> int:
    """Checkpoints on the disk at the worst moment: the latest, the best, milestones and the one being written."""
    saved = math.ceil(steps / every)
    milestones = steps // math.lcm(milestone_every, every) if milestone_every else 0
    return min(saved, keep + 1 + milestones) + 1


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that a run folder is, or will be, on. Raises ValueError where none can be made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {folder}: {there} cannot be written into; choose another with --log.folder")
    return shutil.disk_usage(there).free


def measured_rate(records: list[dict]) -> float | None:
    """Median tokens per second of a run's last 100 reports; None if there are none."""
    rates = [r["tokens_per_s"] for r in records if "tokens_per_s" in r][-100:]
    return statistics.median(rates) if rates else None


def reach(world: World, elements: int = 1 << 22) -> float | None:
    """Seconds of one all-reduce of `elements` float32 over all ranks, checked; None on one process.

    Raises ValueError if it fails or adds up wrong, naming what usually is the cause.
    """
    if world.size == 1:
        return None
    x = torch.full((elements,), float(world.rank), device=world.device)
    try:
        world.sum(x)
        right = x.min().item() == x.max().item() == world.size * (world.size - 1) / 2
        start = time.perf_counter()
        world.sum(x)
        x[0].item()
    except RuntimeError as error:
        raise ValueError(
            f"an all-reduce over {world.size} processes failed ({str(error).splitlines()[0]}); name the network "
            "interface between the machines with NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on a CPU), or rule "
            "InfiniBand out with NCCL_IB_DISABLE=1"
        ) from None
    if not right:
        raise ValueError(f"an all-reduce over {world.size} processes gives wrong sums; check drivers and cables")
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    """90061 -> "1 d 1 h"; two units at most."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    seconds, parts = max(1, round(seconds)), []
    for name, size in units:
        if seconds >= size and len(parts) < 2:
            parts.append(f"{seconds // size} {name}")
            seconds %= size
        elif parts:
            break
    return " ".join(parts)


def report(plan: Plan, world: World) -> tuple[str, bool]:
    """What the run needs, a line a fact, and whether it is all there. Called by every rank.

    Raises ValueError if the ranks do not reach each other.
    """
    seconds, need, shape = reach(world), memory_need(plan.footprint, plan.micro_batch), plan.footprint
    gpu = world.device.type == "cuda"
    there = torch.cuda.get_device_properties(world.device).total_memory if gpu else None
    saving = plan.checkpoint
    kept = checkpoints_kept(plan.steps, saving.every, saving.keep, saving.milestone_every)
    disk, free = kept * (4 * shape.params + plan.whole_state), free_bytes(plan.folder)
    parts = [f"{v / 1e9:.2f}" for v in (need.total, need.weights, need.gradients, need.optimizer, need.activations)]
    tokens = plan.steps * plan.sequences * shape.block
    epochs = f"{plan.epochs:.2f} epochs of {plan.train_tokens:,}"
    accumulation = plan.sequences // (world.size * plan.micro_batch)
    lines = [
        f"preflight of {plan.name} on {world.size} x {world.device.type}",
        f"  memory   {parts[0]} GB a process at the least: weights {parts[1]}, gradients {parts[2]}, optimizer "
        f"{parts[3]}, activations {parts[4]}{verdict(need.total, there) if there else ''}",
        f"  batch    {plan.sequences} sequences = {world.size} processes x {plan.micro_batch} x {accumulation}"
        f"{', as reckoned to fit' if plan.estimated else ''}",
        f"  tokens   {tokens:,} in {plan.steps:,} steps: {epochs}, {plan.dataset}",
        f"  shards   {plan.shards or plan.checked}",
        f"  disk     {disk / 1e9:.2f} GB for {kept} checkpoints{verdict(disk, free)}",
        f"  time     {f'{duration(tokens / plan.rate)} at {plan.rate:,.0f} tokens/s' if plan.rate else 'unknown'}",
        f"  network  {f'all-reduce of 17 MB in {1e3 * seconds:.1f} ms' if seconds else 'one process'}",
    ]
    if saving.background:  # on the first process; the others have no weights to copy
        lines.insert(2, f"  host     {(4 * shape.params + shape.state) / 1e9:.2f} GB to write checkpoints out of")
    return "\n".join(lines), not plan.shards and need.total <= (there or need.total) and disk <= free


def verdict(need: float, there: float) -> str:
    """How a need compares with what there is."""
    return f" of {there / 1e9:.1f} GB" + (": short" if need > there else "")
