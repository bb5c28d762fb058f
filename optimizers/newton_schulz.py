"""Orthogonalized momentum: Newton-Schulz iteration (Jordan et al. 2024) and the direction made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .directions import MatrixDirection, Momentum, MomentumNumbers, State, Step, mix, momentum_numbers

Triple = tuple[float, float, float]  # (a, b, c) of one step, which takes a singular value x to a x + b x^3 + c x^5
Coefficients = Literal["quintic", "polar_express"] | tuple[Triple, ...]
COEFFICIENTS_HELP = "of Newton-Schulz: quintic (as published), polar_express, or a,b,c of each step, one after another"

# K. Jordan, "Muon" (2024): steepest at zero. Singular values end between about 0.7 and 1.2, not at 1.
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
# Amsel et al. 2025, arXiv 2505.16932, listing of the implementation: each step is the best odd quintic for the interval
# in which the step before it leaves singular values from [0.001, 1]. The eighth step is its own limit.
BEST_QUINTICS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # the paper divides the input of each step but the last by it, and the normalized matrix once more
LARGEST = 2.0  # singular value that coefficients may lead to
GRAM_FROM_ASPECT = 2  # matrices at least this many times wider than high iterate on their Gram matrix
RESTART = 3  # steps after which the Gram matrix is computed from the iterate again
HALVES_FROM = 384  # rows from which a symmetric product is faster from three of its four quarters

NSDtype = Literal["auto", "bfloat16", "float16", "float32"]
Scale = Literal["moonlight", "original"]


@dataclass(frozen=True)
class Orthogonal(MatrixDirection):
    """The momentum m = U S V^T replaced by about U V^T: p <- (1 - lr wd) p - lr scale U V^T.

    factor: "moonlight", 0.2 sqrt(max(rows, columns)), the root mean square of an Adam update (Liu et al. 2025, arXiv
    2502.16982), or "original", sqrt(max(1, rows/columns)) (Jordan et al. 2024).
    eps: added to the norm of the momentum. ns_steps: iterations. ns_dtype: see `newton_schulz_dtype`.
    coefficients: see `triples_of`.
    """

    momentum: Momentum
    factor: Scale = "moonlight"
    eps: float = 1e-7
    ns_steps: int = 5
    ns_dtype: NSDtype = "auto"
    coefficients: Coefficients = "quintic"
    label = "orthogonal"
    state_names = ("momentum",)

    def numbers(self, step: Step) -> MomentumNumbers:
        return momentum_numbers(self.momentum, step)

    @staticmethod
    def accumulate(gradient: Tensor, state: list[Tensor], n: MomentumNumbers, out: Tensor) -> None:
        mix(gradient, state[0], n, out)

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        triples = triples_of(self.coefficients, self.ns_steps)
        return orthogonalize(stack, self.eps, self.shared_dtype(stack), triples)

    def shared_dtype(self, p: Tensor) -> torch.dtype:
        return newton_schulz_dtype(self.ns_dtype, p.device)

    def scale(self, rows: int, columns: int) -> float:
        if self.factor == "original":
            return max(1.0, rows / columns) ** 0.5
        return 0.2 * max(rows, columns) ** 0.5


def newton_schulz_dtype(name: NSDtype, device: torch.device) -> torch.dtype:
    """The dtype to iterate in. "auto": bfloat16 on a GPU that has it, float32 elsewhere.

    float16 costs what bfloat16 costs and is eight times closer to the exact iteration: no number of the iteration is
    large, and it has 10 bits after the leading one where bfloat16 has 7. On a GPU the trainer multiplies float32
    matrices in TF32, which has 10 bits, too.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def triples_of(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The coefficients (a, b, c) of each of `steps` steps; the last ones that are given repeat.

    "quintic": those of Jordan 2024 in every step. "polar_express": BEST_QUINTICS with the safety factor of their paper
    (arXiv 2505.16932): a / s, b / s^3, c / s^5 with s = 1.01 in all but the last one, and s^2 in the first one, because
    the paper also divides the normalized matrix by s.
    """
    if coefficients == "quintic":
        found: tuple[Triple, ...] = (QUINTIC,)
    elif coefficients == "polar_express":
        first, *middle, last = BEST_QUINTICS
        found = (_safer(first, SAFETY**2), *(_safer(triple, SAFETY) for triple in middle), last)
    else:
        found = tuple((a, b, c) for a, b, c in coefficients)
    return found[:steps] + found[-1:] * (steps - len(found))


def _safer(triple: Triple, s: float) -> Triple:
    """The coefficients of the polynomial of x / s."""
    a, b, c = triple
    return a / s, b / s**3, c / s**5


def coefficient_errors(coefficients: Coefficients, steps: int = Orthogonal.ns_steps) -> list[str]:
    """What is wrong with coefficients for so many steps, in one line: unused ones, or a matrix that would diverge.

    The normalized matrix has singular values in (0, 1]. Each step must keep them positive and at most LARGEST; this is
    tried for a thousand of them, 1 included.
    """
    if not isinstance(coefficients, str) and len(coefficients) > steps:
        return [f"coefficients: has {len(coefficients)} groups (a, b, c) for {steps} steps; give at most {steps}"]
    problem = _divergence(triples_of(coefficients, steps))
    return [f"coefficients={coefficients!r}: {problem}"] if problem else []


@lru_cache  # an optimizer checks its settings at every step
def _divergence(triples: tuple[Triple, ...]) -> str | None:
    for start in (i / 1000 for i in range(1000, 0, -1)):
        x = start
        for step, (a, b, c) in enumerate(triples, start=1):
            x = x * (a + x * x * (b + x * x * c))
            if not 0 < x <= LARGEST:
                where = f"the singular value {start:g} becomes {x:.3g} in step {step}"
                return f"{where}; each step must keep all values of (0, 1] positive and at most {LARGEST:g}"
    return None


def orthogonalize(
    G: Tensor,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    triples: Sequence[Triple] = (QUINTIC,) * Orthogonal.ns_steps,
) -> Tensor:
    """Matrices G (B, m, n) with U S V^T replaced by about U V^T, as dtype.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = G / (|G|_F + eps), on the transpose if m > n.
    triples: (a, b, c) of each step.
    In float32 on a CPU, wide matrices iterate on A instead of X: every step multiplies X from the left by a polynomial
    in A, so the small products suffice. X and A are formed again after RESTART steps, which keeps the result within
    rounding of the plain iteration. bfloat16 is too coarse for that, and so is TF32, in which a GPU multiplies.
    """
    transposed = G.size(-2) > G.size(-1)
    X = G.mT if transposed else G
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = torch.div(X, norm + eps, out=torch.empty_like(X, dtype=dtype))
    wide = X.size(-1) >= GRAM_FROM_ASPECT * X.size(-2)
    exact = dtype == torch.float32 and X.device.type == "cpu"
    X = (_iterate_on_gram if wide and exact else _iterate)(X, triples)
    return X.mT if transposed else X


def _iterate(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    for a, b, c in triples:
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _iterate_on_gram(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """The same iteration as X <- P X, with P a product of Q = a I + b A + c A^2, and A <- Q A Q."""
    for start in range(0, len(triples), RESTART):
        A = P = _symmetric(X, X.mT)
        some = triples[start : start + RESTART]
        for step, (a, b, c) in enumerate(some):
            Q = _symmetric(A, A).mul_(c).add_(A, alpha=b)
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
            P = _symmetric(Q, P) if step else Q
            if step < len(some) - 1:
                A = _symmetric(_symmetric(Q, A), Q)
        X = torch.bmm(X.mT, P).mT if X.mT.is_contiguous() else torch.bmm(P, X)  # P is symmetric; keep X's layout
    return X


def _symmetric(A: Tensor, B: Tensor) -> Tensor:
    """A B (batch, m, m), known to be symmetric, so the lower left quarter of large products is copied."""
    m = A.size(-2)
    if m < HALVES_FROM:
        return torch.bmm(A, B)
    half, C = m // 2, A.new_empty(A.size(0), m, m)
    torch.bmm(A[:, :half], B, out=C[:, :half])
    torch.bmm(A[:, half:], B[:, :, half:], out=C[:, half:, half:])
    C[:, half:, :half] = C[:, :half, half:].mT
    return C
