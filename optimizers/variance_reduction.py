"""The corrected gradient of MARS (Yuan et al. 2024, arXiv 2411.10438) and its clipping."""

import torch
from torch import Tensor

from .cpu import blocks

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
    """Norms (n,) of the rows of the corrected gradient, or on a CPU of its blocks.

    The compiler sums the rows of many matrices in one kernel, and whole matrices in a kernel each.
    """
    parts = []
    for g, q in blocks(grad, previous):  # one after the other: a block's corrected gradient stays in the cache
        c = corrected(g, q, weight)
        parts.append(torch.linalg.vector_norm(c.reshape(c.shape[0] if c.dim() > 1 else 1, -1), dim=1))
    return torch.cat(parts)


def clip_factors(norms: list[Tensor]) -> list[Tensor]:
    """What scales each tensor to at most unit norm, 0-d, from the norms of its parts."""
    return list(torch.stack(torch._foreach_norm(norms)).clamp(min=1.0).reciprocal().unbind())
