"""The parts of a step that may be compiled: functions over lists of tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .cpu import blocks
from .directions import move_
from .variance_reduction import Number, corrected, row_norms


def norms_of_all(pieces: list[tuple], weight: Number | None) -> list[Tensor]:
    """Norms of the rows of each corrected gradient. pieces: gradient, previous gradient."""
    return [row_norms(grad, previous, weight) for grad, previous in pieces]


def update_all(pieces: list[tuple], weight: Number | None, remember: bool, update: Callable, n: Any) -> None:
    """Call `update` for each parameter. pieces: clip factor, parameter, gradient, previous gradient, state."""
    for factor, *tensors in pieces:
        for p, grad, previous, *state in blocks(*tensors):
            update(p, _prepared(factor, grad, previous, weight, remember), state, n)


def accumulate_all(pieces: list[tuple], weight: Number | None, remember: bool, accumulate: Callable, n: Any) -> None:
    """Call `accumulate` for each matrix. pieces: clip factor, output, gradient, previous gradient, state."""
    for factor, *tensors in pieces:
        for out, grad, previous, *state in blocks(*tensors):
            accumulate(_prepared(factor, grad, previous, weight, remember), state, n, out)


def move_all(updates: list[tuple[Tensor, Tensor, Number]], decay: Number) -> None:
    """Move each weight. updates: weight, update, rate."""
    for p, update, rate in updates:
        move_(p, update.to(p.dtype), decay, rate)


def _prepared(
    factor: Tensor | None, grad: Tensor, previous: Tensor | None, weight: Number | None, remember: bool
) -> Tensor:
    """The corrected, clipped gradient, in memory of its own; remember: keep the raw one in `previous`."""
    c = corrected(grad, previous, weight)
    if remember and previous is not None:
        previous.copy_(grad)
    return c if factor is None else c.mul_(factor)
