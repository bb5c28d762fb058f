"""bench.scaling_model against real processes on one machine whose links have a stated rate.

python -m bench.scaling_validation              1, 2 and 4 processes, two link rates, two minutes
python -m bench.scaling_validation --smoke      seconds

A training step as on GPUs, real DistributedDataParallel and the real optimizer with divided Newton-Schulz, except that
- links are slowed to a stated rate (bench.throttled): what passes over them, and when, is the algorithm's;
- computation is sleep of a stated duration (forward and backward of each block, Newton-Schulz by its FLOPs) beside
  that of a GPT small enough not to count, because processes on a few cores do not compute like GPUs of their own.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench.report import Report
from bench.scaling_model import Rates, ns_flops, step_on, work_of
from bench.throttled import start_throttled
from model import GPT, GPTConfig
from optimizers import MARSMConfig, build_optimizer, composed


@dataclass(frozen=True)
class Plan:
    """A step of the same work for every number of processes. Durations in seconds."""

    model: GPTConfig
    sequences: int = 8  # per step, over all processes; one per forward pass
    forward_s: float = 0.02  # of a block; backward takes twice that
    ns_s: float = 0.4  # Newton-Schulz of all matrices
    warmup: int = 2
    steps: int = 4


def measure(rank: int, processes: int, rate: float, plan: Plan, folder: str) -> None:
    """Take the plan's steps on one of `processes` ranks and leave medians (seconds) in folder/measured.json.

    gradient_s: forward and backward, with what of the all-reduce they do not hide; ns_s: Newton-Schulz of this rank;
    step_s: all.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if processes > 1:
        start_throttled(rank, processes, rate, f"{folder}/store")
    model = GPT(plan.model)
    group = dist.group.WORLD if processes > 1 else None
    optimizer = build_optimizer(model, MARSMConfig(clip_c=False, ns_dtype="bfloat16"), group)
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *_: time.sleep(plan.forward_s))
        block.register_full_backward_pre_hook(lambda *_: time.sleep(2 * plan.forward_s))
    forward = model
    if processes > 1:  # buckets of a tenth of the gradients
        buckets = dict(bucket_cap_mb=4 * model.num_params() / 10 / 2**20, gradient_as_bucket_view=True)
        forward = DistributedDataParallel(model, **buckets)

    all_flops = sum(count * each for count, each, _ in work_of(plan.model).families)
    slept = 0.0

    def orthogonalize(stack: Tensor, steps: int, eps: float, dtype: torch.dtype) -> Tensor:
        nonlocal slept
        duration = plan.ns_s * len(stack) * ns_flops(*stack.shape[1:]) / all_flops
        time.sleep(duration)
        slept += duration
        return stack.to(dtype)

    rows, last = [], plan.sequences // processes - 1
    with mock.patch.object(composed, "orthogonalize", orthogonalize):
        for _ in range(plan.warmup + plan.steps):
            slept = 0.0
            if processes > 1:
                dist.barrier()
            start = time.perf_counter()
            for sequence in range(last + 1):
                tokens = torch.randint(plan.model.vocab_size, (2, 1, plan.model.block_size))
                with nullcontext() if sequence == last or processes == 1 else forward.no_sync():
                    forward(*tokens).backward()
            backward_done = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            optimizer.zero_grad()
            rows.append(dict(gradient_s=backward_done - start, ns_s=slept, step_s=end - start))
    if rank == 0:
        found = {key: median(row[key] for row in rows[plan.warmup :]) for key in rows[0]}
        Path(folder, "measured.json").write_text(json.dumps(found))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def validate(processes: list[int], links: list[float], plan: Plan, report: Report) -> None:
    """Add a row of measured and predicted seconds for every number of processes and link rate (MB/s).

    The model is fed with what one process needs. Exposed is what a step or its part takes beyond computing.
    """
    block, work = plan.model.block_size, work_of(plan.model)
    for n, link in [(1, math.inf), *((n, link) for link in links for n in processes if n > 1)]:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (n, 1e6 * link, plan, folder), nprocs=n)
            found = json.loads(Path(folder, "measured.json").read_text())
        if n == 1:
            elementwise = found["step_s"] - found["gradient_s"] - found["ns_s"]
            one = Rates(plan.sequences * block / found["gradient_s"], found["ns_s"], elementwise, "")
        step = step_on(work, one, 1e6 * link, n, plan.sequences // n * block, block)
        row = dict(processes=n, link_MB_s=link if n > 1 else "", step_s=found["step_s"], predicted_s=step.total)
        row |= dict(error_percent=100 * (step.total / found["step_s"] - 1))
        reduce = found["gradient_s"] - step.compute
        row |= dict(exposed_reduce_s=reduce, predicted_reduce_s=step.exposed_reduce)
        gather = found["step_s"] - found["gradient_s"] - step.ns - step.elementwise
        report.add(**row, exposed_gather_s=gather, predicted_gather_s=step.exposed_gather)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling_validation")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--links", type=float, nargs="+", default=[60, 15], help="MB/s")
    parser.add_argument("--smoke", action="store_true", help="two processes, one link rate, seconds")
    args = parser.parse_args(argv)
    shape = GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=16, vocab_size=5504)  # table: 31 %, as in 124M
    plan, processes, links = Plan(shape), args.processes, args.links
    if args.smoke:
        plan = Plan(replace(shape, n_layer=2), sequences=2, forward_s=0.002, ns_s=0.01, warmup=1, steps=1)
        processes, links = [2], links[:1]
    if bad := [n for n in processes if n < 1 or plan.sequences % n]:
        sys.exit(f"bench.scaling_validation: --processes {bad[0]}: 1, 2, 4 and 8 divide {plan.sequences} sequences")
    if bad := [link for link in links if not link > 0]:
        sys.exit(f"bench.scaling_validation: --links {bad[0]}: must be above 0")
    report = Report("scaling_validation_smoke" if args.smoke else "scaling_validation", torch.device("cpu"))
    validate(processes, links, plan, report)
    report.table()


if __name__ == "__main__":
    main()
