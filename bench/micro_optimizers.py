"""The blocks `ns` and `optim` of bench.micro: Newton-Schulz, and optimizer steps against the bytes they must move."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peers import plain_newton_schulz, published_mars_m
from bench.runs import split_parameters
from bench.timing import Session, compiled
from model import GPT, GPTConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig, Settings, build_optimizer
from optimizers.cohorts import BATCH
from optimizers.newton_schulz import newton_schulz_dtype, orthogonalize

BYTES = {  # bytes moved per parameter, of a matrix and of the rest, if each tensor is read or written only once
    "AdamW fused (torch)": (28, 28),
    "MARS": (44, 44),  # includes the pass that computes the norm of each tensor for clipping
    "MARS-M": (40, 28),
    "MARS-M unclipped": (24, 28),
    "Muon": (24, 28),
    "MARS-M tensor by tensor": (92, 92),
}
ORTHOGONAL = ("MARS-M", "MARS-M unclipped", "Muon")


def matrix_shapes(c: GPTConfig) -> list[tuple[int, int, int]]:
    """(count, m, n) of the matrices of all layers, m <= n: qkv, attention output, and both of the MLP."""
    d = c.n_embd
    return [(c.n_layer, d, 3 * d), (c.n_layer, d, d), (2 * c.n_layer, d, 4 * d)]


def newton_schulz_flops(c: GPTConfig) -> float:
    """FLOPs of five iterations on all matrices: 20 m^2 n + 10 m^3 for each."""
    return sum(count * (20.0 * m * m * n + 10.0 * m**3) for count, m, n in matrix_shapes(c))


def random_stacks(s: Session, c: GPTConfig) -> list[Tensor]:
    """Random matrices like the weights of all layers, one stack for each shape."""
    return [s.randn(*shape, dtype=torch.float32) for shape in matrix_shapes(c)]


def orthogonalize_in_batches(s: Session, stack: Tensor) -> None:
    """The project's Newton-Schulz, in the same batches as in an optimizer step on a GPU."""
    for batch in stack.split(max(1, BATCH // stack[0].numel())):
        orthogonalize(batch, dtype=newton_schulz_dtype("auto", s.device))


def bench_ns(s: Session, size: str, c: GPTConfig) -> None:
    """Newton-Schulz on every matrix of the model, as in each step."""

    def measure(function: Callable) -> dict:
        stacks = random_stacks(s, c)
        seconds = s.seconds(lambda: [function(stack) for stack in stacks])
        return dict(ms=1e3 * seconds, tflops=1e-12 * newton_schulz_flops(c) / seconds)

    def one_by_one(stack: Tensor) -> None:
        for matrix in stack:
            plain_newton_schulz(matrix)

    names: dict[str, Any] = dict(block="ns", size=size)
    s.row(partial(measure, one_by_one), **names, what="plain, matrix by matrix")
    s.row(partial(measure, plain_newton_schulz), **names, what="plain, batched")
    s.row(lambda: measure(compiled(plain_newton_schulz)), **names, what="plain, batched and compiled")
    s.row(partial(measure, partial(orthogonalize_in_batches, s)), **names, what="optimizers/newton_schulz.py")


def bench_optim(s: Session, size: str, c: GPTConfig) -> None:
    """Optimizer steps on given gradients whose norm is known, as in training.

    floor_ms: the time to move the necessary bytes at the speed of a copy, which is measured here.
    to_floor: the time of a step without Newton-Schulz, as a multiple of floor_ms.
    """
    names: dict[str, Any] = dict(block="optim", size=size)

    def measure_copy() -> dict:
        a, b = (s.randn(1 << (18 if s.smoke else 28), dtype=torch.float32) for _ in range(2))
        copy = 2 * a.nbytes / s.seconds(lambda: b.copy_(a))
        stacks = random_stacks(s, c)

        def newton_schulz() -> None:
            for stack in stacks:
                orthogonalize_in_batches(s, stack)

        return dict(copy_tb_s=copy / 1e12, newton_schulz_ms=1e3 * s.seconds(newton_schulz))

    found = s.row(measure_copy, **names, what="copy, and Newton-Schulz alone")
    if not found:
        return
    with torch.device(s.device):
        model = GPT(c)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    matrices, rest = split_parameters(model)

    def own(config: Settings) -> Callable:
        return build_optimizer(model, config, compiled=not s.smoke).step

    sides = {
        "AdamW fused (torch)": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
        "MARS": lambda: own(MARSConfig()),
        "MARS-M": lambda: own(MARSMConfig()),
        "MARS-M unclipped": lambda: own(MARSMConfig(clip_c=False)),
        "Muon": lambda: own(MuonConfig()),
        "MARS-M tensor by tensor": lambda: published_mars_m(matrices, rest),
    }

    def measure(name: str) -> dict:
        ms = 1e3 * s.seconds(sides[name]())
        moved = sum(n * sum(p.numel() for p in part) for n, part in zip(BYTES[name], (matrices, rest), strict=True))
        floor = 1e3 * moved / (1e12 * found["copy_tb_s"])
        elementwise = ms - found["newton_schulz_ms"] if name in ORTHOGONAL else ms
        return dict(ms=ms, floor_ms=floor, to_floor=elementwise / floor)

    for name in sides:
        s.row(partial(measure, name), 90, **names, what=name)
