"""The corrected gradient of MARS (Yuan et al. 2024, arXiv 2411.10438) and its clip; no state of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

Scratch = tuple[Tensor | None, Tensor | None]  # memory for intermediate results of one piece; None: allocate


class EstimateNumbers(NamedTuple):
    """Scalars (0-d, in the dtype of the parameters) of a gradient estimate."""

    on: Tensor  # 1 if the step is to be taken, 0 if it is to be skipped
    inverse_scale: Tensor | None  # what gradients are to be multiplied with; None: 1
    weight: Tensor | None  # from `correction_weight`; None: the raw gradient


def correction_weight(gamma: float, beta: float) -> float:
    """1 + gamma beta / (1 - beta), by which `estimate` goes beyond the previous gradient."""
    return 1 + gamma * beta / (1 - beta)


def estimate(grad: Tensor, previous: Tensor | None, weight: Tensor | None, scratch: Tensor | None = None) -> Tensor:
    """c_t = g_t + gamma beta/(1-beta) (g_t - previous), or g_t where there is no previous gradient.

    `previous` is the last step's gradient (approximate form) or this batch's gradient at the last
    parameters (exact form), and zero at the first step, as in the official code.
    """
    return grad if previous is None else torch.lerp(previous, grad, weight, out=scratch)


def estimate_norm(grad: Tensor, previous: Tensor | None, numbers: EstimateNumbers, scratch: Scratch) -> Tensor:
    """Frobenius norm of the estimate, 0-d; not finite if a gradient is not."""
    if numbers.inverse_scale is not None:
        grad = grad * numbers.inverse_scale
    return torch.linalg.vector_norm(estimate(grad, previous, numbers.weight, scratch[0]))


def taken(
    grad: Tensor,
    previous: Tensor | None,
    factor: Tensor | None,
    numbers: EstimateNumbers,
    remember: bool,
    scratch: Scratch,
) -> Tensor:
    """The estimate as the step takes it: clipped by its factor (0-d), and zero in a step that is to be skipped.

    remember: keep a copy of the gradient as the next step's previous one.
    """
    grad = _finite(grad, numbers.on, scratch[0])
    if numbers.inverse_scale is not None:
        grad.mul_(numbers.inverse_scale)
    c = estimate(grad, previous, numbers.weight, scratch[1])
    if remember:
        previous.lerp_(grad, numbers.on)
    return c.mul_(numbers.on if factor is None else factor)


def _finite(grad: Tensor, on: Tensor, scratch: Tensor | None) -> Tensor:
    """A copy of a gradient in which 0 x grad is 0; the quicker of two ways, compiled and not (3 times on a CPU)."""
    if torch.compiler.is_compiling():
        return torch.where(on > 0, grad, 0.0)
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=scratch)


def unit_norm_factor(norm: Tensor) -> Tensor:
    """1 / max(1, norm), and 0 if that is no number: what scales a tensor of that Frobenius norm to at most 1."""
    return norm.clamp(min=1.0).reciprocal().nan_to_num(nan=0.0)
