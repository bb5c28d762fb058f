"""The corrected gradient of MARS (Yuan et al. 2024, arXiv 2411.10438) and its clipping."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.norms import norm_of

Scratch = tuple[Tensor | None, Tensor | None]  # memory for intermediate results; None: allocate


class GradientNumbers(NamedTuple):
    """0-d tensors, in the dtype of the parameters, that turn a raw gradient into the one a direction receives."""

    take: Tensor  # 1, or 0 if the step is skipped
    inverse_scale: Tensor | None  # factor on raw gradients; None: 1
    weight: Tensor | None  # from `correction_weight`; None: no correction


def correction_weight(gamma: float, beta: float) -> float:
    """1 + gamma beta / (1 - beta), the weight of the gradient in `corrected`."""
    return 1 + gamma * beta / (1 - beta)


def corrected(grad: Tensor, previous: Tensor | None, weight: Tensor | None, out: Tensor | None = None) -> Tensor:
    """c_t = g_t + gamma beta/(1-beta) (g_t - previous), or g_t where there is no previous gradient.

    `previous` is the last step's gradient (approximate form), or this batch's gradient at the last parameters (exact
    form). It is zero at the first step, as in the official code.
    """
    return grad if previous is None or weight is None else torch.lerp(previous, grad, weight, out=out)


def corrected_norm(
    grad: Tensor,
    previous: Tensor | None,
    numbers: GradientNumbers,
    scratch: Scratch,
    norm: Callable[[Tensor], Tensor] = norm_of,
) -> Tensor:
    """Frobenius norm of the corrected gradient, 0-d, or what `norm` gives; not finite if a gradient is not."""
    if numbers.inverse_scale is not None:
        grad = grad * numbers.inverse_scale
    return norm(corrected(grad, previous, numbers.weight, scratch[0]))


def clipped_gradient(
    grad: Tensor,
    previous: Tensor | None,
    factor: Tensor | None,
    numbers: GradientNumbers,
    remember: bool,
    scratch: Scratch,
) -> Tensor:
    """The corrected gradient times its clipping factor (0-d); without clipping, zero if the step is skipped.

    remember: keep a copy of the raw gradient in `previous` for the next step.
    """
    grad = _without_nan(grad, numbers.take, scratch[0])
    if numbers.inverse_scale is not None:
        grad.mul_(numbers.inverse_scale)
    c = corrected(grad, previous, numbers.weight, scratch[1])
    if remember and previous is not None:
        previous.lerp_(grad, numbers.take)
    return c.mul_(numbers.take if factor is None else factor)


def _without_nan(grad: Tensor, take: Tensor, out: Tensor | None) -> Tensor:
    """A copy of a gradient that gives 0 when multiplied by 0, by the faster of two ways in each mode."""
    if torch.compiler.is_compiling():
        return torch.where(take > 0, grad, 0.0)
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=out)


def clip_factors(norms: Tensor) -> Tensor:
    """1 / max(1, norm) of every norm, and 0 where that is not a number: scales tensors to at most unit norm."""
    return norms.clamp(min=1.0).reciprocal().nan_to_num(nan=0.0)
