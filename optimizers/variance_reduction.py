"""The corrected gradient of MARS (Yuan et al. 2024, arXiv 2411.10438) and its clipping."""

import torch
from torch import Tensor

from .cpu import row_blocks

Number = float | Tensor  # in compiled code 0-d, so that another value does not compile again


def correction_weight(gamma: float, beta: float) -> float:
    """1 + gamma beta / (1 - beta), the weight of the gradient in `corrected`."""
    return 1 + gamma * beta / (1 - beta)


def corrected(grad: Tensor, previous: Tensor | None, weight: Number | None) -> Tensor:
    """c_t = g_t + gamma beta/(1-beta) (g_t - previous), or a copy of g_t if weight is None.

    `previous` is the last step's gradient (approximate form), or this batch's gradient at the last parameters (exact
    form). It is zero at the first step, as in the official code.
    """
    if previous is None or weight is None:
        return grad.clone()
    return torch.lerp(previous, grad, weight)


def row_norms(grad: Tensor, previous: Tensor | None, weight: Number | None) -> Tensor:
    """Norms (n,) of the rows of the corrected gradient, of a vector one norm in float64.

    A row's norm does not depend on the other rows, so shards of rows give the same norms as the whole tensor. The
    compiler sums the rows of many matrices in one kernel, and whole matrices in a kernel each.
    """
    parts = []
    for g, q in row_blocks(grad, previous):  # one after the other: a block's corrected gradient stays in the cache
        c, dtype = corrected(g, q, weight), torch.float64 if grad.dim() < 2 else None
        parts.append(torch.linalg.vector_norm(c.reshape(len(c) if c.dim() > 1 else 1, -1), dim=1, dtype=dtype))
    return torch.cat(parts)


def norms_from_rows(rows: list[Tensor]) -> Tensor:
    """The norm of each tensor (k,), or of each rank's shard, in float64, from the norms of its rows.

    In float64 it hardly matters how the rows are divided over ranks.
    """
    return torch.stack(torch._foreach_norm(rows, 2, torch.float64))


def clip_factors(norms: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What scales each tensor to at most unit norm, 0-d, from their norms (k,)."""
    return list(norms.to(dtype).clamp(min=1.0).reciprocal().unbind())
