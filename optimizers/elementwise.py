"""The parts of a step that may be compiled: functions over lists of tensors, and what calls them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cpu import blocks
from .directions import move_
from .variance_reduction import Number, corrected, row_norms

# updates that share only 0-d numbers become one kernel, too
INDUCTOR: dict[str, Any] = {"score_fusion_memory_threshold": 1}


class Runner:
    """Calls the functions below, compiled or as they are, and makes the numbers that they receive."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self._functions: dict[Callable, Callable] = {}  # compiled
        if compiled:  # each function is compiled once for each combination of shapes
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def __call__(self, function: Callable, *arguments: Any, eager: bool = False) -> Any:
        """The result of a function. eager: call it as it is."""
        if eager or not self.compiled:
            return function(*arguments)
        if function not in self._functions:
            self._functions[function] = torch.compile(function, dynamic=False, options=INDUCTOR)
        return self._functions[function](*arguments)

    def number(self, x: float, dtype: torch.dtype) -> Number:
        """A number for a function that may be compiled: compiled, a 0-d tensor on the CPU."""
        return torch.tensor(x, dtype=dtype) if self.compiled else x

    def numbers(self, n: Any, dtype: torch.dtype) -> Any:
        """The same for a NamedTuple of numbers."""
        return type(n)(*torch.tensor(n, dtype=dtype).unbind()) if self.compiled else n

    def __getstate__(self) -> dict[str, Any]:  # what is compiled can be neither copied nor pickled
        return {"compiled": self.compiled, "_functions": {}}


def norms_of_all(pieces: list[tuple], weight: Number | None) -> list[Tensor]:
    """Norms of the rows of each corrected gradient. pieces: gradient, previous gradient."""
    return [row_norms(grad, previous, weight) for grad, previous in pieces]


def update_all(
    pieces: list[tuple], weight: Number | None, remember: bool, update: Callable, n: Any, cautious: Number | None
) -> None:
    """Call `update` for each parameter. pieces: clip factor, parameter, gradient, previous gradient, state.

    cautious: see `move_cautiously_`; n then has no decay, so `update` moves zeros by what it would add to a weight.
    """
    for factor, *tensors in pieces:
        for p, grad, previous, *state in blocks(*tensors):
            target = p if cautious is None else torch.zeros_like(p)
            update(target, _prepared(factor, grad, previous, weight, remember), state, n)
            if cautious is not None:
                move_cautiously_(p, target, cautious)


def accumulate_all(pieces: list[tuple], weight: Number | None, remember: bool, accumulate: Callable, n: Any) -> None:
    """Call `accumulate` for each matrix. pieces: clip factor, output, gradient, previous gradient, state."""
    for factor, *tensors in pieces:
        for out, grad, previous, *state in blocks(*tensors):
            accumulate(_prepared(factor, grad, previous, weight, remember), state, n, out)


def move_all(updates: list[tuple[Tensor, Tensor, Number]], decay: Number, cautious: Number | None) -> None:
    """Move each weight. updates: weight, update, rate. cautious: see `move_cautiously_`; then decay is 1."""
    for p, update, rate in updates:
        if cautious is None:
            move_(p, update.to(p.dtype), decay, rate)
        else:
            move_cautiously_(p, update.to(p.dtype) * -rate, cautious)


def move_cautiously_(p: Tensor, move: Tensor, amount: Number) -> None:
    """p <- p + move - amount p where move does not lead away from zero (move p <= 0), and p + move elsewhere.

    Cautious weight decay (Chen et al. 2025, arXiv 2510.12402, algorithm 1); amount is the rate times the weight decay.
    """
    p.add_(torch.where(move * p <= 0, move - p * amount, move))


def _prepared(
    factor: Tensor | None, grad: Tensor, previous: Tensor | None, weight: Number | None, remember: bool
) -> Tensor:
    """The corrected, clipped gradient, in memory of its own; remember: keep the raw one in `previous`."""
    c = corrected(grad, previous, weight)
    if remember and previous is not None:
        previous.copy_(grad)
    return c if factor is None else c.mul_(factor)
