"""Check what a run needs before it starts: memory, disk, data, time, and communication between the ranks."""

import math
import os
import shutil
import statistics
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from config.schema import RunConfig
from data.hellaswag import HellaSwag
from data.loader import TrainLoader, to_device
from data.shards import MANIFEST, Dataset, open_dataset, shard_problems
from model import GPT
from optimizers import build_optimizer
from optimizers.state import state_bytes
from runtime.command import first_line, parse_number
from runtime.compute import apply_compute, wants_bf16, wants_compile
from runtime.distributed import World
from runtime.errors import UserError
from runtime.gamma import copied_bytes
from runtime.hardware import available_memory
from runtime.logger import METRICS, read_metrics
from runtime.memory import (
    MemoryEstimate,
    MicroBatch,
    choose_micro_batch,
    divisors,
    estimated_micro_batch,
    peak_of_pass,
)

if TYPE_CHECKING:
    from train_gpt import Trainer


def memory_estimate(run: RunConfig, model: GPT, optimizer: Optimizer, world: World) -> MemoryEstimate:
    """Memory of one process in training.

    Backward keeps these elements per token and layer, with fused attention and no dropout, in units of the width C:
    the inputs of the two norms (2), their outputs (2), q k v (3), attention's output (1), the MLP's hidden layer
    before and after gelu (8). In float32 that is 16 x 4 bytes. In bf16 the residual stream, which the norms read, may
    stay float32: 2 x 4 + 14 x 2 bytes. Activation checkpointing keeps the input of each block, and all of one block.
    The logits, their gradient and the loss need V x (4 + 4 + 4) bytes per token in float32. In bf16 the allocator's
    peak was 10.3 bytes per logit in eager code, and 4.3 in compiled code, which fuses the loss with the output layer.
    """
    c, params, bf16 = model.config, model.num_params(), wants_bf16(run.dtype, world.device)
    element, logits = (2, 10.3) if bf16 else (4, 12.0)
    if bf16 and wants_compile(run.compile, world.device):
        logits = 4.3
    residual = (model.residual_dtype or torch.float32).itemsize
    block = 2 * residual + 14 * element
    blocks = residual * c.n_layer + block if model.recompute_blocks else block * c.n_layer
    return MemoryEstimate(
        # autocast keeps a bf16 copy of the weights; --ema keeps a float32 copy
        weights=params * ((6 if bf16 else 4) + (4 if run.ema else 0)),
        gradients=4 * params * (2 if world.size > 1 else 1),  # the accumulated ones, and the all-reduce buckets
        optimizer=state_bytes(optimizer),
        activations=round(c.block_size * (blocks * c.n_embd + logits * c.padded_vocab_size)),
        halves=copied_bytes(optimizer) if run.chooses_gamma else 0,
    )


def fitting_micro_batch(t: "Trainer", sequences: int) -> MicroBatch:
    """The largest micro-batch that fits and divides `sequences`: measured on a GPU, estimated on a CPU."""

    def loss(micro_batch: int) -> Tensor:
        tokens = torch.zeros(micro_batch, t.run.model.block_size + 1, dtype=torch.uint16)
        with t.unsynchronized(), t.autocast:
            return t.forward(*to_device(tokens, t.world.device))

    def attempt(micro_batch: int) -> int:
        return peak_of_pass(partial(loss, micro_batch), t.model.parameters(), reserve, t.world.device)

    need = memory_estimate(t.run, t.model, t.optimizer, t.world)
    late = 0 if t.optimizer.state else need.optimizer  # torch optimizers allocate state at their first step
    reserve = need.halves + late
    return choose_micro_batch(need, sequences, t.world, attempt)


def on_meta_device(run: RunConfig, world: World) -> tuple[GPT, Optimizer]:
    """The model and the optimizer of a run, without memory for their tensors."""
    with torch.device("meta"):
        model = GPT(run.model)
    apply_compute(model, run.compute, wants_bf16(run.dtype, world.device))
    return model, build_optimizer(model, run.optim, world.group)


def check_shards(dataset: Dataset, world: World, verify: bool) -> tuple[list[str], str]:
    """The problems of the shards, and how the shards were checked. Each rank checks a part of them."""
    if not (dataset.folder / MANIFEST).exists():
        return [], "headers agree; there is no manifest to check against"
    found = world.gather(shard_problems(dataset.folder, verify, world.rank, world.size))
    checked = "headers, counts and sha256 agree" if verify else "headers and counts agree; --verify hashes them, too"
    return [problem for part in found for problem in part], checked


def checkpoints_kept(steps: int, every: int, keep: int, milestone_every: int) -> int:
    """The largest number of checkpoints on the disk: the latest, the best, milestones, and one in writing."""
    milestones = steps // milestone_every if milestone_every else 0
    saved = math.ceil(steps / every) + milestones
    return min(saved, keep + 1 + milestones) + 1


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a run folder that may not exist yet. Raises UserError if it cannot be created."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run folder {folder}: {existing} cannot be written into; choose another with --log.folder")
    return shutil.disk_usage(existing).free


def measured_rate(records: list[dict]) -> float | None:
    """Median tokens per second of a run's last 100 logged steps; None if there are none."""
    rates = [r["tokens_per_s"] for r in records if "tokens_per_s" in r][-100:]
    return statistics.median(rates) if rates else None


def all_reduce_seconds(world: World, elements: int = 1 << 22) -> float | None:
    """Seconds of one checked all-reduce of `elements` float32 over all ranks; None with one process.

    Raises UserError, with the usual causes, if it fails or gives a wrong sum.
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
        raise UserError(
            f"an all-reduce over {world.size} processes failed ({first_line(error)}); name the network "
            "interface between the machines with NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on a CPU), or switch "
            "InfiniBand off with NCCL_IB_DISABLE=1"
        ) from None
    if not right:
        raise UserError(f"an all-reduce over {world.size} processes gives wrong sums; check drivers and cables")
    return time.perf_counter() - start


def report(run: RunConfig, world: World, verify: bool, rate: float | None) -> tuple[str, bool]:
    """What the run needs, one fact a line, and whether all of it is available. Called by every rank.

    verify: hash every shard. rate: tokens/s; None: as an earlier start of this run measured it, if there was one.
    Raises UserError for a file or a batch that cannot be used, and if the ranks cannot communicate.
    """
    folder, steps, saving = Path(run.log.folder) / run.name, run.total_steps, run.checkpoint
    tokens, per_process = steps * run.tokens_per_step, run.per_process(world.size)
    dataset = open_dataset(run.data.path, run.model.vocab_size)
    if run.data.hellaswag:
        HellaSwag.of_run(run.data, dataset)
    sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
    epochs = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes).epochs(steps * run.sequences)
    problems, checked = check_shards(dataset, world, verify)
    if rate is None and (folder / METRICS).exists():
        rate = measured_rate(read_metrics(folder / METRICS))

    model, optimizer = on_meta_device(run, world)
    need, memory = memory_estimate(run, model, optimizer, world), available_memory(world.device)
    estimated = "" if run.micro_batch else ", estimated to fit"
    divided = run.divided(world.size)
    most = run.micro_batch or estimated_micro_batch(need, divided, world, memory)
    micro_batch = divisors(divided, most)[0]
    total, limit = need.total(micro_batch), memory[1] if world.device.type == "cuda" else math.inf

    weights, all_state = (8 if run.ema else 4) * model.num_params(), state_bytes(build_optimizer(model, run.optim))
    kept = checkpoints_kept(steps, saving.every, saving.keep, saving.milestone_every)
    disk, free = kept * (weights + all_state), free_bytes(folder)
    seconds = all_reduce_seconds(world)
    lines = [
        f"preflight of {run.name} on {world.size} x {world.device.type}",
        f"  memory   at least {gb(total)} a process: weights {gb(need.weights)}, "
        f"gradients {gb(need.gradients + need.halves)}, optimizer {gb(need.optimizer)}, "
        f"activations {gb(micro_batch * need.activations)}{compared(total, limit)}",
        f"  batch    {run.sequences} sequences = {world.size} processes x {micro_batch} x "
        f"{per_process // micro_batch}{estimated}",
        f"  tokens   {tokens:,} in {steps:,} steps: {epochs:.2f} epochs of {dataset.tokens('train'):,} "
        f"in {run.data.path}",
        f"  shards   {'; '.join(problems) or checked}",
        f"  disk     {gb(disk)} for {kept} checkpoints{compared(disk, free)}",
        f"  time     {time_needed(tokens, rate)}",
        f"  network  {f'all-reduce of 17 MB in {1e3 * seconds:.1f} ms' if seconds else 'one process'}",
    ]
    if saving.background:  # on the first process; the others copy no weights
        copy = gb(weights + need.optimizer)
        lines.insert(2, f"  host     {copy} for the copy that background checkpoints are written from")
    return "\n".join(lines), not problems and total <= limit and disk <= free


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def compared(need: float, limit: float) -> str:
    """A need in comparison with the available bytes; empty without a limit."""
    if need > limit:
        return f", exceeds the {gb(limit)} available"
    return f"; {gb(limit)} are available" if limit < math.inf else ""


def time_needed(tokens: int, rate: float | None) -> str:
    """The time for a number of tokens at a rate in tokens/s, in words."""
    return f"{timedelta(seconds=math.ceil(tokens / rate))} at {rate:,.0f} tokens/s" if rate else "unknown"


def preflight(run: RunConfig, world: World, verify: bool, rate: str | None) -> None:
    """Print what the run needs; the exit status is 1 if something is missing. Raises UserError for a bad rate."""
    try:
        tokens_per_s = parse_number(rate) if rate is not None else None
    except ValueError:
        tokens_per_s = math.nan
    if tokens_per_s is not None and not 1 <= tokens_per_s < math.inf:
        raise UserError(f"--tokens_per_s={rate}: must be a number of at least 1")
    text, good = report(run, world, verify, tokens_per_s)
    if world.is_main:
        print(text, flush=True)
    if not world.from_main(good):
        sys.exit(1)
