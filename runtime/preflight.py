"""What a run will need, reckoned before it starts: memory, disk, time, and whether the ranks reach each other."""

import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.distributed import World


@dataclass(frozen=True)
class Plan:
    """What the reckoning needs to know of a run."""

    name: str
    folder: Path
    params: int
    state: int  # bytes of optimizer state in this process
    whole_state: int  # and over all processes
    layers: int
    width: int
    vocab: int  # padded
    half: bool  # bf16 autocast
    lookahead: bool  # exact form of the correction
    stream: int  # bytes of a number in the residual stream
    recompute: bool  # activation checkpointing
    block: int  # tokens of a sequence
    sequences: int  # of a step, over all processes
    micro_batch: int
    steps: int
    windows: int  # of the training split
    dataset: str
    train_tokens: int
    shards: str | None  # what is wrong with the shards
    checked: str  # how they were checked
    checkpoint: dict[str, int]  # every, keep, milestone_every
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


def memory_need(plan: Plan) -> Need:
    """Memory of one process in training.

    Per token and layer, what backward keeps with fused attention and no dropout, in elements of the width C:
    inputs of the two norms (2), their outputs (2), q k v (3), attention's output (1), the MLP's hidden layer
    before and after gelu (8): 16 x 4 bytes in float32. In bf16 the residual stream, which the norms read, may stay
    float32: 2 x 4 + 14 x 2. Activation checkpointing keeps the block's input, and one block as above. Per token the
    logits, their gradient and the loss's float32 copy: V x (4 + 4 + 4) or V x (2 + 2 + 4) bytes.
    """
    element, logits = (2, 8) if plan.half else (4, 12)
    block = 2 * plan.stream + 14 * element
    blocks = plan.stream * plan.layers + block if plan.recompute else block * plan.layers
    activations = plan.micro_batch * plan.block * (blocks * plan.width + logits * plan.vocab)
    weights = plan.params * (6 if plan.half else 4)  # autocast keeps a bf16 copy of the weights
    gradients = 4 * plan.params * (2 if plan.lookahead else 1)  # the exact form keeps the next batch's besides
    return Need(weights, gradients, plan.state, activations)


def checkpoints_kept(steps: int, every: int, keep: int, milestone_every: int) -> int:
    """Checkpoints on the disk at the worst moment: the latest, the best, milestones and the one being written."""
    saved = math.ceil(steps / every)
    milestones = steps // math.lcm(milestone_every, every) if milestone_every else 0
    return min(saved, keep + 1 + milestones) + 1


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that a folder is, or will be, on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


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
    seconds, need = reach(world), memory_need(plan)
    gpu = world.device.type == "cuda"
    there = torch.cuda.get_device_properties(world.device).total_memory if gpu else None
    kept = checkpoints_kept(plan.steps, **plan.checkpoint)
    disk, free = kept * (4 * plan.params + plan.whole_state), free_bytes(plan.folder)
    parts = [f"{v / 1e9:.2f}" for v in (need.total, need.weights, need.gradients, need.optimizer, need.activations)]
    tokens = plan.steps * plan.sequences * plan.block
    accumulation = plan.sequences // (world.size * plan.micro_batch)
    epochs = plan.steps * plan.sequences / plan.windows
    lines = [
        f"preflight of {plan.name} on {world.size} x {world.device.type}",
        f"  memory   {parts[0]} GB a process at the least: weights {parts[1]}, gradients {parts[2]}, optimizer "
        f"{parts[3]}, activations {parts[4]}{verdict(need.total, there) if there else ''}",
        f"  batch    {plan.sequences} sequences = {world.size} processes x {plan.micro_batch} x {accumulation}",
        f"  tokens   {tokens:,} in {plan.steps:,} steps: {epochs:.2f} epochs of {plan.train_tokens:,}, {plan.dataset}",
        f"  shards   {plan.shards or plan.checked}",
        f"  disk     {disk / 1e9:.2f} GB for {kept} checkpoints{verdict(disk, free)}",
        f"  time     {f'{duration(tokens / plan.rate)} at {plan.rate:,.0f} tokens/s' if plan.rate else 'unknown'}",
        f"  network  {f'all-reduce of 17 MB in {1e3 * seconds:.1f} ms' if seconds else 'one process'}",
    ]
    return "\n".join(lines), not plan.shards and need.total <= (there or need.total) and disk <= free


def verdict(need: float, there: float) -> str:
    """How a need compares with what there is."""
    return f" of {there / 1e9:.1f} GB" + (": short" if need > there else "")
