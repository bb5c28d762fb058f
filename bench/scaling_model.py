"""Step time, exposed communication and efficiency on W GPUs, computed from one GPU's numbers and link rates.

python -m bench.scaling_model                                   assumed rates, 1, 8, 64 and 512 GPUs
python -m bench.scaling_model --measured FILE ...               rates of one GPU as bench.ladder writes them
python -m bench.scaling_model --intra 370 --inter 45 --gpus 16 32 --batch_size 512

The step (DistributedDataParallel, MARS-M with one buffer, Newton-Schulz divided over its owners):

    step = compute + exposed all-reduce + Newton-Schulz of the busiest rank + elementwise + exposed gather

The all-reduce of fp32 gradients begins with the first bucket, a tenth into the last backward pass, and cannot end
before the buckets have passed that are complete only when it ends: those of the first block and of the tied table.
The gather of a family's bf16 results begins when they are there and runs while the next family is computed.
Rings: 2 (W - 1) / W of the gradients and (W - 1) / W of the results pass every link. No latencies, no stragglers.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.report import markdown
from bench.timing import COPY, ROOT, SIZES
from config.load import load_config
from model import GPT, GPTConfig
from optimizers.newton_schulz import by_shape

BUCKET = 0.1  # of the gradients: the size of an all-reduce

# Assumed of one H200 (in FLOP/s of an H100, too), not measured. GEMM by size; the rest alike for all.
GEMM = {"124M": 620e12, "355M": 660e12, "774M": 690e12, "1558M": 700e12}
ATTENTION, NEWTON_SCHULZ = 280e12, 500e12  # FLOP/s
ASSUMED = "assumed, not measured"
GIVEN = ("tokens_per_s", "ns_ms", "elementwise_ms", "optimizer_share")  # what a measurement may give


@dataclass(frozen=True)
class Work:
    """What a step has to do, of the model alone."""

    params: int
    matrix: int  # parameters of matrices; they go through Newton-Schulz
    tail: float  # share of the gradients complete only when backward ends
    families: tuple[tuple[int, float, int], ...]  # matrices of one shape: how many, FLOPs and parameters of each

    def elementwise_bytes(self, gpus: int) -> float:
        """Weights decayed and moved and cast, momentum of owned matrices, AdamW on the rest, the gradient norm."""
        return (12 + 12 / gpus) * self.matrix + 30 * (self.params - self.matrix) + 4 * self.params


@dataclass(frozen=True)
class Rates:
    """One GPU: tokens/s forward and backward, seconds of Newton-Schulz and of the elementwise update, all matrices."""

    tokens_per_s: float
    ns_s: float
    elementwise_s: float
    source: str = ASSUMED


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts."""

    compute: float
    ns: float
    elementwise: float
    exposed_reduce: float
    exposed_gather: float

    @property
    def total(self) -> float:
        return self.compute + self.ns + self.elementwise + self.exposed_reduce + self.exposed_gather

    @property
    def efficiency(self) -> float:
        """Share of the step spent forward and backward."""
        return self.compute / self.total


@functools.cache
def work_of(config: GPTConfig) -> Work:
    """The work of a model, from its parameters in the order in which backward completes their gradients."""
    with torch.device("meta"):
        model = GPT(config)
    roles, total = model.parameter_roles(), model.num_params()
    tail = bucket = 0
    late = False  # whether the bucket waits for the first block or the embeddings
    for name, p in reversed(list(model.named_parameters())):
        bucket, late = bucket + p.numel(), late or roles[name] == "embedding" or ".h.0." in name
        if bucket >= BUCKET * total:
            tail, bucket, late = tail + bucket * late, 0, False
    families = by_shape([p for n, p in model.named_parameters() if roles[n] == "matrix"], 1)
    sizes = tuple((len(f), ns_flops(*f[0].shape), f[0].numel()) for f in families)
    return Work(total, sum(count * params for count, _, params in sizes), (tail + bucket) / total, sizes)


def ns_flops(rows: int, columns: int) -> float:
    """FLOPs of five Newton-Schulz steps on one matrix: 20 m^2 n + 10 m^3 with m the shorter side."""
    m, n = sorted((rows, columns))
    return 20.0 * m * m * n + 10.0 * m**3


def step_on(work: Work, rates: Rates, link: float, gpus: int, tokens: int, last_tokens: int) -> Step:
    """A step of `tokens` on each of `gpus`, the last micro-batch of `last_tokens`, over links of `link` bytes/s."""
    compute = tokens / rates.tokens_per_s
    ring = (gpus - 1) / gpus / link
    reduce = 2 * ring * 4 * work.params
    backward = 2 / 3 * last_tokens / rates.tokens_per_s
    exposed_reduce = max(work.tail * reduce, reduce - (1 - BUCKET) * backward)
    flops = sum(count * each for count, each, _ in work.families)
    ns = sent = 0.0
    for count, each, params in work.families:
        ns += rates.ns_s * -(-count // gpus) * each / flops  # the first rank owns ceil(count / gpus)
        sent = max(ns, sent) + ring * 2 * count * params
    elementwise = rates.elementwise_s * work.elementwise_bytes(gpus) / work.elementwise_bytes(1)
    return Step(compute, ns, elementwise, exposed_reduce, sent - ns)


def assumed_rates(size: str, config: GPTConfig, micro: int) -> Rates:
    """A roofline of one H200 without a measurement in it."""
    work, V, C, L = work_of(config), config.padded_vocab_size, config.n_embd, config.n_layer
    seconds = 6 * (work.matrix + V * C) / GEMM[size] + 7 * L * C * config.block_size / ATTENTION
    moved = 90 * L * C + 3 * 2 * V + 18 * work.params / (micro * config.block_size)  # pointwise, loss, casts: bytes
    per_token = 1.03 * (seconds + moved / (0.92 * COPY))  # 3 % of gaps
    ns = sum(count * each for count, each, _ in work.families) / NEWTON_SCHULZ
    return Rates(1 / per_token, ns, work.elementwise_bytes(1) / COPY)


def rates_of(assumed: Rates, given: dict[str, float], source: str, tokens: int) -> Rates:
    """Assumed rates with those replaced that are given: tokens_per_s, and any other of GIVEN.

    optimizer_share: the optimizer's fraction of a step of `tokens`; tokens_per_s is then that of the whole step.
    """
    if not given:
        return assumed
    share, rate = given.get("optimizer_share", 0.0), given["tokens_per_s"]
    elementwise = given.get("elementwise_ms", 1e3 * assumed.elementwise_s) / 1e3
    ns = max(0.0, share * tokens / rate - elementwise) if share else assumed.ns_s
    ns = given.get("ns_ms", 1e3 * ns) / 1e3
    rest = [key for key in ("ns_ms", "elementwise_ms") if key not in given and not (share and key == "ns_ms")]
    words = f"{source}: {', '.join(given)}" + (f"; {', '.join(rest)} {ASSUMED}" if rest else "")
    return Rates(rate / (1 - share), ns, elementwise, words)


def read_measured(path: str) -> dict[str, tuple[dict[str, float], str]]:
    """For each size that a file of JSON lines measured: what it gives (GIVEN), and where it was measured.

    Of rows with a rung, as bench.ladder writes them, "best" counts; of those, the one with most tokens_per_s.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        hardware = next((row["hardware"] for row in rows if "hardware" in row), "hardware not named")
        rows = [row for row in rows if row.get("size") in SIZES and row.get("tokens_per_s")]
        rows = sorted((r for r in rows if r.get("rung", "best") == "best"), key=lambda row: row["tokens_per_s"])
        out = {row["size"]: {key: float(row[key]) for key in GIVEN if row.get(key) is not None} for row in rows}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--measured {path}: not JSON lines of numbers ({error})") from None
    if not out:
        raise ValueError(f"--measured {path}: no row has a size of {', '.join(SIZES)} and tokens_per_s")
    for key, value in ((k, v) for given in out.values() for k, v in given.items()):
        if not 0 < value < (1 if key == "optimizer_share" else math.inf):
            raise ValueError(f"--measured {path}: {key}={value}: must be above 0, optimizer_share also below 1")
    return {size: (given, f"measured on {hardware}") for size, given in out.items()}


def table(args: argparse.Namespace) -> list[dict]:
    """A row for every size and number of GPUs. Raises ValueError for a batch that does not divide."""
    measured, rows = {size: given for path in args.measured for size, given in read_measured(path).items()}, []
    for size in args.sizes:
        run = load_config(ROOT / f"config/{SIZES[size]}.py", ["--micro_batch=1"])
        block, work = run.model.block_size, work_of(run.model)
        for gpus in args.gpus:
            batch = args.batch_size or (run.sequences if run.sequences % gpus == 0 else 8 * gpus)
            count = dataclasses.replace(run, batch_size=batch).accumulation(gpus)  # sequences of a GPU
            micro = max(m for m in range(1, min(args.micro_batch, count) + 1) if count % m == 0)
            rates = assumed_rates(size, run.model, micro)
            rates = rates_of(rates, *measured.get(size, ({}, "")), run.tokens_per_step)
            link = args.intra if gpus <= args.gpus_per_node else min(args.intra, args.inter)
            step = step_on(work, rates, link * 1e9, gpus, count * block, micro * block)
            parts = {f"{key}_ms": 1e3 * seconds for key, seconds in dataclasses.asdict(step).items()}
            rows.append(dict(size=size, gpus=gpus, sequences=batch, step_ms=1e3 * step.total, **parts))
            rows[-1] |= dict(efficiency=step.efficiency, tokens_per_s=batch * block / step.total, rates=rates.source)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling_model")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--batch_size", type=int, help="sequences; default: 480 where it divides, else 8 per GPU")
    parser.add_argument("--micro_batch", type=int, default=30, help="most sequences of a forward pass")
    parser.add_argument("--intra", type=float, default=370, help="bus bandwidth within a machine, GB/s, per GPU")
    parser.add_argument("--inter", type=float, default=370, help="bus bandwidth between machines, GB/s, per GPU")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    said = f"JSON lines with size, tokens_per_s and perhaps {', '.join(GIVEN[1:])}"
    parser.add_argument("--measured", metavar="FILE", nargs="+", default=[], help=said)
    args = parser.parse_args(argv)
    try:
        for key in ("gpus", "batch_size", "micro_batch", "intra", "inter", "gpus_per_node"):
            for value in args.gpus if key == "gpus" else [getattr(args, key)]:
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"--{key} {value}: must be above 0")
        rows = table(args)
    except ValueError as error:
        sys.exit(f"bench.scaling_model: {error}")
    print(f"links as stated, not measured: {args.intra:g} GB/s within, {args.inter:g} GB/s between machines\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
