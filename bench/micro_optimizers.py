"""The blocks `ns` and `optim` of bench.micro: Newton-Schulz, and optimizer steps against the bytes they must move."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.peers import plain_newton_schulz, published_mars_m
from bench.timing import Session
from model import GPT, GPTConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig, Settings, build_optimizer
from optimizers.composed import BATCH
from optimizers.newton_schulz import newton_schulz_dtype, orthogonalize

BYTES = {  # moved per parameter of a matrix and of the rest, each tensor touched once: floors
    "AdamW fused (torch)": (28, 28),
    "MARS": (44, 44),  # with the pass for the clip of each tensor
    "MARS-M": (40, 28),
    "MARS-M unclipped": (24, 28),
    "Muon": (24, 28),
    "MARS-M tensor by tensor": (92, 92),
}
ORTHOGONAL = ("MARS-M", "MARS-M unclipped", "Muon")


def stacks(s: Session, c: GPTConfig) -> list[Tensor]:
    """Random matrices like the weights of all layers, one stack (count, m, n) for each shape."""
    d = c.n_embd
    shapes = [(c.n_layer, d, 3 * d), (c.n_layer, d, d), (2 * c.n_layer, d, 4 * d)]  # qkv; proj; both of the MLP
    return [s.randn(*shape, dtype=torch.float32) for shape in shapes]


def as_in_a_step(s: Session, stack: Tensor) -> None:
    """The project's own Newton-Schulz, in the batches that its optimizers make on a GPU."""
    for batch in stack.split(max(1, BATCH // stack[0].numel())):
        orthogonalize(batch, dtype=newton_schulz_dtype("auto", s.device))


def newton_schulz_flops(c: GPTConfig) -> float:
    """FLOPs of five steps on all matrices: 20 m^2 n + 10 m^3 for each (m, n), m the shorter side."""
    d, flops = c.n_embd, 0.0
    for count, m, n in ((c.n_layer, d, 3 * d), (c.n_layer, d, d), (2 * c.n_layer, d, 4 * d)):
        flops += count * (20.0 * m * m * n + 10.0 * m**3)
    return flops


def bench_ns(s: Session, size: str, c: GPTConfig) -> None:
    """Newton-Schulz on every matrix of the model, as in each step."""

    def measure(function: Callable) -> dict:
        every = stacks(s, c)
        seconds = s.seconds(lambda: [function(stack) for stack in every])
        return dict(ms=1e3 * seconds, tflops=1e-12 * newton_schulz_flops(c) / seconds)

    def one_by_one(stack: Tensor) -> None:
        for matrix in stack:
            plain_newton_schulz(matrix)

    def compiled() -> dict:
        return measure(torch.compile(plain_newton_schulz, fullgraph=True, dynamic=False))

    names = dict(block="ns", size=size)
    s.row(lambda: measure(one_by_one), **names, what="plain, matrix by matrix")
    s.row(lambda: measure(plain_newton_schulz), **names, what="plain, batched")
    s.row(compiled, **names, what="plain, batched and compiled")
    s.row(lambda: measure(partial(as_in_a_step, s)), **names, what="optimizers/newton_schulz.py")


def bench_optim(s: Session, size: str, c: GPTConfig) -> None:
    """Optimizer steps from gradients that are there, their norm known, as in training.

    floor_ms: the bytes that must move, at the rate of a copy measured here. to_floor: what a step takes beside
    Newton-Schulz, in floors.
    """
    names = dict(block="optim", size=size)
    ready: list[GPT] = []

    def prepare() -> dict:
        a, b = (s.randn(1 << (18 if s.smoke else 28), dtype=torch.float32) for _ in range(2))
        copy = 2 * a.nbytes / s.seconds(lambda: b.copy_(a))
        every = stacks(s, c)
        apart = s.seconds(lambda: [as_in_a_step(s, stack) for stack in every])
        with torch.device(s.device):
            ready.append(GPT(c))
        for p in ready[0].parameters():
            p.grad = torch.randn_like(p).mul_(1e-3)
        return dict(copy_tb_s=copy / 1e12, newton_schulz_ms=1e3 * apart)

    found = s.row(prepare, **names, what="copy, and Newton-Schulz by itself")
    if not found:
        return
    model, copy, apart = ready[0], 1e12 * found["copy_tb_s"], found["newton_schulz_ms"] / 1e3
    roles = model.parameter_roles()
    matrices = [p for n, p in model.named_parameters() if roles[n] == "matrix"]
    rest = [p for n, p in model.named_parameters() if roles[n] != "matrix"]
    counts = [sum(p.numel() for p in part) for part in (matrices, rest)]

    def own(config: Settings) -> Callable:
        optimizer = build_optimizer(model, config, compiled=not s.smoke)
        optimizer.found_inf = torch.zeros((), device=s.device)
        return optimizer.step

    sides = {
        "AdamW fused (torch)": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
        "MARS": lambda: own(MARSConfig()),
        "MARS-M": lambda: own(MARSMConfig()),
        "MARS-M unclipped": lambda: own(MARSMConfig(clip_c=False)),
        "Muon": lambda: own(MuonConfig()),
        "MARS-M tensor by tensor": lambda: published_mars_m(matrices, rest),
    }

    def measure(name: str) -> dict:
        seconds = s.seconds(sides[name]())
        moved = sum(n * count for n, count in zip(BYTES[name], counts, strict=True))
        inner = apart if name in ORTHOGONAL else 0.0
        numbers = dict(ms=1e3 * seconds, floor_ms=1e3 * moved / copy, to_floor=(seconds - inner) * copy / moved)
        return numbers

    for name in sides:
        s.row(partial(measure, name), 90, **names, what=name)
