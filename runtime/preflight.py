"""Check what a run needs before it starts: memory, disk, data, time, and communication between the ranks."""

import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.optim import Optimizer

from config.schema import RunConfig, largest_divisor
from data.hellaswag import HellaSwag
from data.loader import TrainLoader
from data.shards import MANIFEST, Dataset, open_dataset, shard_problems
from model import GPT
from optimizers import build_optimizer
from optimizers.state import state_bytes
from runtime.command import parse_number
from runtime.compute import apply_compute, wants_bf16
from runtime.distributed import World
from runtime.hardware import available_memory
from runtime.logger import METRICS, read_metrics
from runtime.memory import Footprint, estimated_micro_batch, memory_need


@dataclass(frozen=True)
class Requirements:
    """The facts that the report is computed from."""

    footprint: Footprint
    total_state: int  # bytes of optimizer state over all processes
    micro_batch: int
    epochs: float  # passes over the training split
    train_tokens: int
    shard_problems: list[str]
    checked: str  # how the shards were checked
    rate: float | None  # tokens/s over all processes


def footprint(run: RunConfig, model: GPT, optimizer: Optimizer, world: World) -> Footprint:
    """The facts that decide the memory of one process of a run."""
    c = run.model
    return Footprint(
        params=model.num_params(),
        state=state_bytes(optimizer),
        layers=c.n_layer,
        width=c.n_embd,
        vocab=c.padded_vocab_size,
        block=c.block_size,
        bf16=wants_bf16(run.dtype, world.device),
        residual=(model.residual_dtype or torch.float32).itemsize,
        recompute=model.recompute_blocks,
        processes=world.size,
    )


def requirements(run: RunConfig, world: World, verify: bool, rate: float | None) -> Requirements:
    """Everything the report needs. Raises ValueError for a file or a batch that cannot be used.

    verify: hash every shard. rate: tokens/s; None: as an earlier start of this run measured it, if there was one.
    """
    c, metrics, per_process = run.model, Path(run.log.folder) / run.name / METRICS, run.share(world.size)
    dataset = open_dataset(run.data.path, c.vocab_size)
    if run.data.hellaswag:
        HellaSwag.of_run(run.data, dataset)
    sizes = dict(block_size=c.block_size, batch_size=run.sequences, vocab_size=c.vocab_size, seed=run.seed)
    problems, checked = check_shards(dataset, world, verify)
    with torch.device("meta"):
        model = GPT(c)
        apply_compute(model, run.compute, wants_bf16(run.dtype, world.device))
    of = footprint(run, model, build_optimizer(model, run.optim, world.group), world)
    if run.micro_batch is None:
        micro_batch = estimated_micro_batch(of, per_process, world, available_memory(world.device))
    else:
        micro_batch = largest_divisor(per_process, run.micro_batch)
    return Requirements(
        footprint=of,
        total_state=state_bytes(build_optimizer(model, run.optim)),
        micro_batch=micro_batch,
        epochs=TrainLoader(dataset, run.data, **sizes).epochs(run.total_steps),
        train_tokens=dataset.tokens("train"),
        shard_problems=problems,
        checked=checked,
        rate=measured_rate(read_metrics(metrics)) if rate is None and metrics.exists() else rate,
    )


def check_shards(dataset: Dataset, world: World, verify: bool) -> tuple[list[str], str]:
    """The problems of the shards, and how the shards were checked. Each rank checks a part of them."""
    if not (dataset.folder / MANIFEST).exists():
        return [], "headers agree; there is no manifest to check against"
    found = world.gather(shard_problems(dataset.folder, verify, world.rank, world.size))
    checked = "headers, counts and sha256 agree" if verify else "headers and counts agree; --verify hashes them, too"
    return [problem for part in found for problem in part], checked


def checkpoints_kept(steps: int, every: int, keep: int, milestone_every: int) -> int:
    """The largest number of checkpoints on the disk: the latest, the best, milestones, and one in writing."""
    saved = math.ceil(steps / every)
    milestones = steps // math.lcm(milestone_every, every) if milestone_every else 0
    return min(saved, keep + 1 + milestones) + 1


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a run folder that may not exist yet. Raises ValueError if it cannot be created."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {folder}: {existing} cannot be written into; choose another with --log.folder")
    return shutil.disk_usage(existing).free


def measured_rate(records: list[dict]) -> float | None:
    """Median tokens per second of a run's last 100 logged steps; None if there are none."""
    rates = [r["tokens_per_s"] for r in records if "tokens_per_s" in r][-100:]
    return statistics.median(rates) if rates else None


def all_reduce_seconds(world: World, elements: int = 1 << 22) -> float | None:
    """Seconds of one checked all-reduce of `elements` float32 over all ranks; None with one process.

    Raises ValueError, with the usual causes, if it fails or gives a wrong sum.
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
            "interface between the machines with NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on a CPU), or switch "
            "InfiniBand off with NCCL_IB_DISABLE=1"
        ) from None
    if not right:
        raise ValueError(f"an all-reduce over {world.size} processes gives wrong sums; check drivers and cables")
    return time.perf_counter() - start


def compared(need: float, available: float) -> str:
    """A need in comparison with the available bytes."""
    gb = f"{available / 1e9:.1f} GB"
    return f", exceeds the {gb} available" if need > available else f" of {gb}"


def report(run: RunConfig, of: Requirements, world: World) -> tuple[str, bool]:
    """What the run needs, one fact a line, and whether all of it is available. Called by every rank.

    Raises ValueError if the ranks cannot communicate.
    """
    seconds, need, shape = all_reduce_seconds(world), memory_need(of.footprint, of.micro_batch), of.footprint
    gpu, saving, steps = world.device.type == "cuda", run.checkpoint, run.total_steps
    available = available_memory(world.device)[1] if gpu else math.inf
    kept = checkpoints_kept(steps, saving.every, saving.keep, saving.milestone_every)
    disk, free = kept * (4 * shape.params + of.total_state), free_bytes(Path(run.log.folder) / run.name)
    parts = [f"{v / 1e9:.2f}" for v in (need.total, need.weights, need.gradients, need.optimizer, need.activations)]
    tokens, accumulation = steps * run.tokens_per_step, run.sequences // (world.size * of.micro_batch)
    lines = [
        f"preflight of {run.name} on {world.size} x {world.device.type}",
        f"  memory   at least {parts[0]} GB a process: weights {parts[1]}, gradients {parts[2]}, optimizer "
        f"{parts[3]}, activations {parts[4]}{compared(need.total, available) if gpu else ''}",
        f"  batch    {run.sequences} sequences = {world.size} processes x {of.micro_batch} x {accumulation}"
        f"{', estimated to fit' if run.micro_batch is None else ''}",
        f"  tokens   {tokens:,} in {steps:,} steps: {of.epochs:.2f} epochs of {of.train_tokens:,}, {run.data.path}",
        f"  shards   {'; '.join(of.shard_problems) or of.checked}",
        f"  disk     {disk / 1e9:.2f} GB for {kept} checkpoints{compared(disk, free)}",
        f"  time     {time_needed(tokens, of.rate)}",
        f"  network  {f'all-reduce of 17 MB in {1e3 * seconds:.1f} ms' if seconds else 'one process'}",
    ]
    if saving.background:  # on the first process; the others copy no weights
        copy = (4 * shape.params + shape.state) / 1e9
        lines.insert(2, f"  host     {copy:.2f} GB for the copy that background checkpoints are written from")
    return "\n".join(lines), not of.shard_problems and need.total <= available and disk <= free


def time_needed(tokens: int, rate: float | None) -> str:
    """The time for a number of tokens at a rate in tokens/s, in words."""
    return f"{timedelta(seconds=math.ceil(tokens / rate))} at {rate:,.0f} tokens/s" if rate else "unknown"


def preflight(run: RunConfig, world: World, verify: bool, rate: str | None) -> None:
    """Print what the run needs; the exit status is 1 if something is missing. Raises ValueError for a bad rate."""
    try:
        tokens_per_s = parse_number(rate) if rate is not None else None
        if tokens_per_s is not None and not 1 <= tokens_per_s < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"--tokens_per_s={rate}: must be a number of at least 1") from None
    text, good = report(run, requirements(run, world, verify, tokens_per_s), world)
    if world.is_main:
        print(text, flush=True)
    if not world.from_main(good):
        sys.exit(1)
