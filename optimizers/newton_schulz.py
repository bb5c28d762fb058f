"""Orthogonalized momentum: Newton-Schulz iteration (Jordan et al. 2024) and the direction made of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .directions import MatrixDirection, Momentum, MomentumNumbers, State, Step, mix, momentum_numbers

# K. Jordan, "Muon" (2024): steepest at zero. Singular values end between about 0.7 and 1.2, not at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
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
    """

    momentum: Momentum
    factor: Scale = "moonlight"
    eps: float = 1e-7
    ns_steps: int = 5
    ns_dtype: NSDtype = "auto"
    label = "orthogonal"
    state_names = ("momentum",)

    def numbers(self, step: Step) -> MomentumNumbers:
        return momentum_numbers(self.momentum, step)

    @staticmethod
    def accumulate(gradient: Tensor, state: list[Tensor], n: MomentumNumbers, out: Tensor) -> None:
        mix(gradient, state[0], n, out)

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        return orthogonalize(stack, self.ns_steps, self.eps, self.shared_dtype(stack))

    def shared_dtype(self, p: Tensor) -> torch.dtype:
        return newton_schulz_dtype(self.ns_dtype, p.device)

    def scale(self, rows: int, columns: int) -> float:
        if self.factor == "original":
            return max(1.0, rows / columns) ** 0.5
        return 0.2 * max(rows, columns) ** 0.5


def newton_schulz_dtype(name: NSDtype, device: torch.device) -> torch.dtype:
    """The dtype to iterate in. "auto": bfloat16 on a GPU that has it, float32 elsewhere.

    float16 costs what bfloat16 costs and is eight times closer to the exact iteration: no number of the iteration is
    above 4, and it has 10 bits after the leading one where bfloat16 has 7. On a GPU the trainer multiplies float32
    matrices in TF32, which has 10 bits, too.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def orthogonalize(G: Tensor, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices G (B, m, n) with U S V^T replaced by about U V^T, as dtype.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = G / (|G|_F + eps), on the transpose if m > n.
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
    X = (_iterate_on_gram if wide and exact else _iterate)(X, steps)
    return X.mT if transposed else X


def _iterate(X: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _iterate_on_gram(X: Tensor, steps: int) -> Tensor:
    """The same iteration as X <- P X, with P a product of Q = a I + b A + c A^2, and A <- Q A Q."""
    a, b, c = COEFFICIENTS
    for start in range(0, steps, RESTART):
        A = P = _symmetric(X, X.mT)
        count = min(RESTART, steps - start)
        for step in range(count):
            Q = _symmetric(A, A).mul_(c).add_(A, alpha=b)
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
            P = _symmetric(Q, P) if step else Q
            if step < count - 1:
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
