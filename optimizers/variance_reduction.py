"""The corrected gradient of MARS (Yuan et al. 2024, arXiv 2411.10438) and its clip; no state of its own."""

from typing import NamedTuple

import torch
from torch import Tensor


class EstimateNumbers(NamedTuple):
    """Scalars (0-d) of a gradient estimate."""

    ok: Tensor | None  # whether the step is to be taken
    scale: Tensor | None  # gradients are to be divided by this; None: by 1
    weight: Tensor | None  # from `correction_weight`; None: the raw gradient


def correction_weight(gamma: float, beta: float) -> float:
    """1 + gamma beta / (1 - beta), by which `estimate` goes beyond the previous gradient."""
    return 1 + gamma * beta / (1 - beta)


def estimate(grad: Tensor, previous: Tensor | None, numbers: EstimateNumbers) -> Tensor:
    """c_t = g_t + gamma beta/(1-beta) (g_t - previous), or g_t where there is no previous gradient.

    `previous` is the last step's gradient (approximate form) or this batch's gradient at the last
    parameters (exact form), and zero at the first step, as in the official code.
    """
    if numbers.scale is not None:
        grad = grad / numbers.scale
    return grad if previous is None else torch.lerp(previous, grad, numbers.weight)


def taken(
    grad: Tensor, previous: Tensor | None, factor: Tensor | None, numbers: EstimateNumbers, remember: bool
) -> Tensor:
    """The estimate as the step takes it: clipped by its factor (0-d), and zero in a step that is to be skipped.

    remember: keep a copy of the gradient as the next step's previous one.
    """
    c = estimate(grad, previous, numbers)
    if factor is not None:
        c = c * factor
    if remember:
        raw = grad if numbers.scale is None else grad / numbers.scale
        previous.copy_(torch.where(numbers.ok, raw, previous))
    return torch.where(numbers.ok, c, torch.zeros((), dtype=c.dtype, device=c.device))


def unit_norm_factor(norm: Tensor) -> Tensor:
    """1 / max(1, norm): what scales a tensor of that Frobenius norm to at most 1, without asking the device."""
    return norm.clamp(min=1.0).reciprocal()
