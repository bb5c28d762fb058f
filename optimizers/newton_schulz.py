"""Newton-Schulz orthogonalization (Jordan et al. 2024), the only one in the project."""

from collections.abc import Iterable

import torch
from torch import Tensor

# K. Jordan, "Muon" (2024): steepest at zero. Singular values end between about 0.7 and 1.2, not at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
GRAM_FROM_ASPECT = 2  # at least so wide: iterate on the Gram matrix
NS_DTYPES = ("auto", "bfloat16", "float32")
RESTART = 3  # steps after which the Gram matrix is computed anew from the iterate
HALVES_FROM = 384  # rows from which a symmetric product is quicker from three of its four quarters


def newton_schulz_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to iterate in. "auto": bfloat16 on a GPU that has it, float32 elsewhere. ValueError for any other."""
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if name not in NS_DTYPES:
        raise ValueError(f"ns_dtype={name!r}: must be one of {', '.join(NS_DTYPES)}")
    return getattr(torch, name)


def orthogonalize(G: Tensor, steps: int = 5, eps: float = 1e-7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Matrices G (B, m, n) with U S V^T replaced by about U V^T, as dtype.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = G / (|G|_F + eps), on the transpose if m > n.
    In float32, wide matrices iterate on A instead of X: every step multiplies X from the left by a
    polynomial in A, so the small products suffice; X and A are formed anew after RESTART steps, which
    keeps the result within rounding of the plain iteration (with TF32 products, within theirs). bfloat16
    is too coarse for that.
    """
    transposed = G.size(-2) > G.size(-1)
    X = G.mT if transposed else G
    wide = torch.promote_types(X.dtype, torch.float32)
    largest = X.abs().amax((-2, -1), keepdim=True).to(wide).clamp(min=torch.finfo(torch.float32).tiny)
    X = X / largest.to(X.dtype)  # so that the norm of neither huge nor tiny matrices overflows
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=wide)
    X = X.div_((norm + eps / largest).to(X.dtype)).to(dtype)
    gram = dtype == torch.float32 and X.size(-1) >= GRAM_FROM_ASPECT * X.size(-2)
    iterate = _iterate_on_gram if gram else _iterate
    X = iterate(X, steps)
    return X.mT if transposed else X


def _iterate(X: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _iterate_on_gram(X: Tensor, steps: int) -> Tensor:
    """The same iteration as X <- P X with P a product of Q = a I + b A + c A^2, and A <- Q A Q."""
    a, b, c = COEFFICIENTS
    for start in range(0, steps, RESTART):
        A, P = _symmetric(X, X.mT), None
        count = min(RESTART, steps - start)
        for step in range(count):
            Q = _symmetric(A, A).mul_(c).add_(A, alpha=b)
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
            P = Q if P is None else _symmetric(Q, P)
            if step < count - 1:
                A = _symmetric(_symmetric(Q, A), Q)
        X = torch.bmm(X.mT, P).mT if X.mT.is_contiguous() else torch.bmm(P, X)  # P is symmetric; keep X's layout
    return X


def _symmetric(A: Tensor, B: Tensor) -> Tensor:
    """A B (batch, m, m), known to be symmetric, so that the lower left quarter of large ones is not computed."""
    m = A.size(-2)
    if m < HALVES_FROM:
        return torch.bmm(A, B)
    half, C = m // 2, A.new_empty(A.size(0), m, m)
    torch.bmm(A[:, :half], B, out=C[:, :half])
    torch.bmm(A[:, half:], B[:, :, half:], out=C[:, half:, half:])
    C[:, half:, :half] = C[:, :half, half:].mT
    return C


def matrix_shape(p: Tensor, blocks: int) -> tuple[int, int]:
    """Rows and columns of a parameter seen as `blocks` matrices; filters are flattened to (out, rest)."""
    return p.shape[0] // blocks, p[0].numel()


def as_wide_matrices(p: Tensor, blocks: int) -> Tensor:
    """A parameter as (blocks, m, n) with m <= n, transposed where it is tall."""
    matrices = p.reshape(blocks, *matrix_shape(p, blocks))
    return matrices.mT if matrices.size(1) > matrices.size(2) else matrices


def by_shape(params: Iterable[Tensor], blocks: int) -> list[list[Tensor]]:
    """Families of parameters whose matrices have one shape, a matrix and its transpose alike."""
    families: dict[tuple[int, int], list[Tensor]] = {}
    for p in params:
        families.setdefault(tuple(sorted(matrix_shape(p, blocks))), []).append(p)
    return list(families.values())
