"""Check what a run needs before it starts: memory, disk, data, time, and communication between the ranks."""

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from data.hellaswag import HellaSwag
from data.loader import TrainLoader
from data.shards import MANIFEST, Dataset, missing_dataset, open_dataset, shard_problems
from model import GPT
from optimizers import build_optimizer
from optimizers.state import state_bytes
from runtime.command import first_line, parse_number
from runtime.distributed import ALONE, World
from runtime.errors import UserError
from runtime.hardware import Machines, available_memory, parse_machines, peak_of_card
from runtime.probe import existing_parent, open_files, probe
from training.compute import apply_compute, wants_bf16, wants_compile
from training.logger import METRICS, read_metrics
from training.memory import (
    MemoryEstimate,
    MicroBatch,
    choose_micro_batch,
    divisors,
    largest_fitting,
    peak_of_pass,
)
from training.parallel import description, is_sharded, shards
from training.run_config import RunConfig

MANY_EPOCHS = 10
ASSUMED_MFU = 0.4  # fraction of the peak that a run on planned GPUs is assumed to reach


def memory_estimate(run: RunConfig, model: GPT, optimizer: Optimizer, world: World) -> MemoryEstimate:
    """Memory of one process in training.

    Backward keeps these elements per token and layer, with fused attention and no dropout, in units of the width C:
    the inputs of the two norms (2), their outputs (2), q k v (3), attention's output (1), the MLP's hidden layer
    before and after gelu (8). In float32 that is 16 x 4 bytes. In bf16 the residual stream, which the norms read, may
    stay float32: 2 x 4 + 14 x 2 bytes. Activation checkpointing keeps the input of each block, and all of one block.
    A chosen micro-batch has at most 2^31 logits: beyond, kernels compute addresses in 64 bits, which is slower, and
    torch 2.11 multiplies wrongly under max-autotune (pytorch/pytorch#189054).
    The logits, their gradient and the loss need V x (4 + 4 + 4) bytes per token in float32. In bf16 the allocator's
    peak is 12.1 bytes per logit in eager code, and 2.7 with compute.fused_loss. Compiled code needs 2.2: the gradient
    takes the place of the logits.
    """
    c, params, bf16 = model.config, model.num_params(), wants_bf16(run.dtype, world.device)
    element, logits = (2, 2.7 if run.compute.fused_loss else 12.1) if bf16 else (4, 12.0)
    if bf16 and wants_compile(run.compile, world.device):
        logits = 2.2
    residual = (model.residual_dtype or torch.float32).itemsize
    block = 2 * residual + 14 * element
    blocks = residual * c.n_layer + block if model.recompute_blocks else block * c.n_layer
    average = 4 if run.ema else 0  # --ema keeps a float32 copy
    weights = params * ((6 if bf16 else 4) + average)  # autocast keeps a bf16 copy
    gradients, state = 4 * params, state_bytes(optimizer)
    if (each := shards(run.compute.shard, world)) > 1:
        largest = max(sum(p.numel() for p in block.parameters()) for block in model.transformer.h)
        others = params - sum(p.numel() for p in model.transformer.h.parameters())
        weights = params * (4 + average) // each + (2 * params if bf16 else 0) + 4 * (others + 2 * largest)
        gradients = 4 * params // each + 4 * params + 4 * max(others, largest)
        state = state if is_sharded(model) else -(-state // each)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=round(c.block_size * (blocks * c.n_embd + logits * c.padded_vocab_size)),
        most=max(1, (2**31 - 1) // (c.block_size * c.padded_vocab_size)),
    )


def fitting_micro_batch(
    run: RunConfig, model: GPT, optimizer: Optimizer, world: World, loss: Callable[[int], Tensor]
) -> MicroBatch:
    """The largest micro-batch that fits and divides a process's batch: measured on a GPU, estimated on a CPU.

    It is estimated if the model is sharded, too: every pass communicates, and if one process ran out of memory, the
    others would wait for it. loss: maps n to the loss of a micro-batch of n sequences, computed as in training.
    """
    need = memory_estimate(run, model, optimizer, world)
    reserve = 0 if optimizer.state else need.optimizer  # torch optimizers allocate state at their first step

    def attempt(micro_batch: int) -> int:
        return peak_of_pass(partial(loss, micro_batch), model.parameters(), reserve, world.device)

    return choose_micro_batch(need, run.per_process(world.size), world, None if is_sharded(model) else attempt)


def on_meta_device(run: RunConfig, world: World) -> tuple[GPT, Optimizer]:
    """The model and the optimizer of a run on the meta device, so without memory for their tensors."""
    with torch.device("meta"):
        model = GPT(run.model)
    apply_compute(model, run.compute, wants_bf16(run.dtype, world.device))
    return model, build_optimizer(model, run.optim, world.group if shards(run.compute.shard, world) == 1 else None)


def check_shards(dataset: Dataset, world: World, verify: bool) -> tuple[list[str], str]:
    """The problems of the shards, and how the shards were checked. Each rank checks a part of them."""
    if not (dataset.folder / MANIFEST).exists():
        return [], "headers agree; there is no manifest to check against"
    found = world.gather(shard_problems(dataset.folder, verify, world.rank, world.size))
    checked = "headers, counts and sha256 agree" if verify else "headers and counts agree; --verify hashes them, too"
    return [problem for part in found for problem in part], checked


def checkpoints_kept(steps: int, every: int, keep: int, milestone_every: int) -> int:
    """The largest number of checkpoints on the disk: the latest, the best, milestones, and the one being written."""
    milestones = steps // milestone_every if milestone_every else 0
    saved = math.ceil(steps / every) + milestones
    return min(saved, keep + 1 + milestones) + 1


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
            f"an all-reduce over {world.size} processes failed ({first_line(error)}); set NCCL_SOCKET_IFNAME "
            "(GLOO_SOCKET_IFNAME on a CPU) to the network interface between the machines, or switch InfiniBand "
            "off with NCCL_IB_DISABLE=1"
        ) from None
    if not right:
        raise UserError(f"an all-reduce over {world.size} processes gives wrong sums; check drivers and cables")
    return time.perf_counter() - start


def planned_state(optimizer: Optimizer, processes: int) -> int:
    """Optimizer state of one process of a planned run, in bytes: each process owns an equal part of the matrices."""
    owned = getattr(getattr(optimizer, "ownership", None), "owner", ())
    of_matrices = sum(t.nbytes for p in owned for t in optimizer.state[p].values())
    return state_bytes(optimizer) - of_matrices + -(-of_matrices // processes)


@dataclass(frozen=True)
class Needs:
    """What one process of a run needs, and what its checkpoints need; sizes in bytes."""

    memory: MemoryEstimate
    micro_batch: int  # given, or the largest that is estimated to fit
    limit: int  # memory that is available to a process
    checkpoints: int  # largest number on the disk
    disk: int  # of these checkpoints
    copies: int  # in host memory of the first process, from which checkpoints are written

    @property
    def total(self) -> int:
        return self.memory.total(self.micro_batch)


def needs_of(run: RunConfig, world: World, machines: Machines | None) -> Needs:
    """What a run needs on the machine at hand, or on planned ones. Every rank must call it."""
    model, optimizer = on_meta_device(run, world)
    need, all_state = memory_estimate(run, model, optimizer, world), state_bytes(optimizer)
    sharded = shards(run.compute.shard, world) > 1
    memory = (machines.memory, machines.memory) if machines else available_memory(world.device)
    if machines and not sharded:
        need = replace(need, optimizer=planned_state(optimizer, world.size))
    if not machines:
        all_state = state_bytes(build_optimizer(model, run.optim))
    divided = run.per_process(world.size)
    most = run.micro_batch or largest_fitting(need, divided, world, memory)
    micro_batch = divisors(divided, most if machines else min(world.gather(most)))[0]
    limit = memory[1] if world.device.type == "cuda" else memory[0] // world.local_size
    saving, weights = run.checkpoint, (8 if run.ema else 4) * model.num_params()
    kept = checkpoints_kept(run.total_steps, saving.every, saving.keep, saving.milestone_every)
    copies = (sharded + saving.background) * (weights + need.optimizer)  # whole tensors; and their copies
    return Needs(need, micro_batch, limit, kept, kept * (weights + all_state), copies)


def memory_lines(run: RunConfig, world: World, machines: Machines | None) -> tuple[list[str], bool]:
    """What a process and the checkpoints need, one fact a line, and whether memory and disk suffice."""
    found = needs_of(run, world, machines)
    need, micro_batch = found.memory, found.micro_batch
    free = math.inf if machines else shutil.disk_usage(existing_parent(Path(run.log.folder) / run.name)).free
    lines = [
        f"  memory   at least {gb(found.total)} a process: weights {gb(need.weights)}, "
        f"gradients {gb(need.gradients)}, optimizer {gb(need.optimizer)}, "
        f"activations {gb(micro_batch * need.activations)}{compared(found.total, found.limit)}",
        f"  batch    {run.sequences} sequences = {world.size} processes x {micro_batch} x "
        f"{run.per_process(world.size) // micro_batch}{'' if run.micro_batch else ', estimated to fit'}",
        f"  disk     {gb(found.disk)} for {found.checkpoints} checkpoints{compared(found.disk, free)}",
    ]
    if sharded := description(run.compute.shard, world):
        lines.insert(0, f"  shard    {sharded}")
    if found.copies:
        lines.append(f"  host     {gb(found.copies)} for what checkpoints are written from")
    return lines, found.total <= found.limit and found.disk <= free


def planned_run(run: RunConfig, machines: Machines) -> tuple[RunConfig, World]:
    """A run as it would be on planned GPUs, in bfloat16 and compiled if it may choose, and its first process."""
    run = replace(run, dtype="bfloat16" if run.dtype == "auto" else run.dtype)
    run = replace(run, compile="true" if run.compile == "auto" else run.compile)
    return run, World(0, machines.processes, torch.device("cuda"), local_size=machines.gpus)


def assumed_rate(run: RunConfig, machines: Machines) -> float | None:
    """Tokens per second of a run on planned GPUs at ASSUMED_MFU; None for a card whose peak is not known."""
    peak, passes = peak_of_card(machines.card), 1 if getattr(run.optim, "is_approx", True) else 2
    flops = passes * on_meta_device(run, ALONE)[0].flops_per_token()
    return ASSUMED_MFU * machines.processes * peak / flops if peak else None


def data_lines(run: RunConfig, world: World, verify: bool) -> tuple[list[str], bool]:
    """The facts of the dataset, one a line, and whether it is usable. For a missing one, a line says how to make it."""
    budget = f"{run.total_steps * run.tokens_per_step:,} in {run.total_steps:,} steps"
    if not Path(run.data.path).exists():
        return [f"  tokens   {budget}", f"  shards   {missing_dataset(Path(run.data.path))}"], False
    dataset = open_dataset(run.data.path, run.model.vocab_size)
    if run.data.hellaswag:
        HellaSwag.of_run(run.data, dataset)
    sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
    loader = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes)
    epochs = loader.epochs(run.total_steps * run.sequences)
    many = f"; more than {MANY_EPOCHS}: the model will memorize the text" if epochs > MANY_EPOCHS else ""
    problems, checked = check_shards(dataset, world, verify)
    return [
        f"  tokens   {budget}: {epochs:,.2f} epochs of {dataset.tokens('train'):,} in {run.data.path}{many}",
        f"  shards   {'; '.join(problems) or checked}",
    ], not problems


def report(
    run: RunConfig, world: World, verify: bool, rate: float | None, machines: Machines | None
) -> tuple[str, bool]:
    """What the run needs, one fact a line, and whether all of it is available. Every rank must call it.

    verify: hash every shard. rate: tokens/s; None: as an earlier start of this run measured it, if there was one.
    machines: plan for these GPUs instead of the machine at hand.
    Raises UserError for a file or a batch that cannot be used, and if the ranks cannot communicate.
    """
    folder, tokens = Path(run.log.folder) / run.name, run.total_steps * run.tokens_per_step
    planned, title = world, f"{world.size} x {world.device.type}"
    if machines:
        run, planned = planned_run(run, machines)
        title = str(machines)
    memory, enough = memory_lines(run, planned, machines)
    data, good = data_lines(run, world, verify)
    if rate is None and not machines and (folder / METRICS).exists():
        rate = measured_rate(read_metrics(folder / METRICS))
    time_line = f"  time     {time_needed(tokens, rate)}"
    if machines and rate is None and (assumed := assumed_rate(run, machines)):
        time_line = f"  time     {time_needed(tokens, assumed)}, with an assumed MFU of {ASSUMED_MFU:.0%}, not measured"
    lines = [f"preflight of {run.name} on {title}", *memory, *data, time_line]
    if not machines:
        seconds = all_reduce_seconds(world)
        lines.append(f"  network  {f'all-reduce of 17 MB in {1e3 * seconds:.1f} ms' if seconds else 'one process'}")
        cannot, writable = probe(existing_parent(folder))
        lines += [f"  files    {line}" for line in cannot or ["write, flush, lock and rename work"]]
        lines.append(f"  files    {open_files():,} may be open at a time")
        enough = enough and writable
    return "\n".join(lines), enough and (good or machines is not None)  # a plan needs no data yet


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


def preflight(run: RunConfig, world: World, verify: bool, rate: str | None, machines: str | None) -> None:
    """Print what the run needs; the exit status is 1 if something is missing. Raises UserError for a bad option."""
    planned = parse_machines(machines) if machines else None
    try:
        tokens_per_s = parse_number(rate) if rate is not None else None
    except ValueError:
        tokens_per_s = math.nan
    if tokens_per_s is not None and not 1 <= tokens_per_s < math.inf:
        raise UserError(f"--tokens_per_s={rate}: must be a number of at least 1")
    text, good = report(run, world, verify, tokens_per_s, planned)
    if world.is_main:
        print(text, flush=True)
    if not world.from_main(good):
        sys.exit(1)
