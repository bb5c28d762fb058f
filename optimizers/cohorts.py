"""Parameters that take a step together, and how many of them at a time."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .directions import MatrixDirection, Step
from .matrices import families
from .owners import Owners
from .settings import Rule
from .shards import local
from .variance_reduction import Number

BATCH = 1 << 27  # elements of matrices worked on at a time on a GPU: bounds the memory beside the weights


@dataclass(frozen=True)
class Cohort:
    """Parameters of a group that share one rule and one step count."""

    rule: Rule
    owners: Owners
    params: list[Tensor]
    step: Step
    weight: Number | None  # of the gradient in the corrected one; None: the raw gradient
    remember: bool  # this step's gradient is the next one's previous gradient (the approximate form)
    blocks: int
    cautious: Number | None  # what cautious decay takes off a weight, relative to it; None: the direction decays
    factors: dict[Tensor, Tensor] = field(default_factory=dict)  # 0-d, that clip the corrected gradients

    @property
    def direction(self) -> Any:
        return self.rule.direction

    @cached_property
    def numbers(self) -> Any:
        """The numbers of this step, floats."""
        return self.direction.numbers(self.step)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def is_matrix(self) -> bool:
        return isinstance(self.direction, MatrixDirection)


def chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def advanced(moves: Iterable[Generator]) -> list[Generator]:
    """Run each generator to its next pause; those that are not at their end."""
    return [move for move in moves if next(move, "end") is None]


def parts_of(cohort: Cohort) -> Iterator[list[Tensor]]:
    """Matrices of one shape, which are moved together; a process that is alone frees the memory of each part."""
    for family in families(cohort.params, cohort.blocks):
        yield from chunks(family, at_once(family[0]) if cohort.owners.size == 1 else len(family))


def at_once(like: Tensor) -> int:
    """How many matrices are worked on at a time."""
    # on a CPU each matrix is alone: as fast, less memory, and independent of which matrices a rank owns
    return max(1, BATCH // like.numel()) if like.device.type == "cuda" else 1


def parts_here(params: list[Tensor]) -> dict[Tensor, Tensor]:
    """What this rank holds of parameters, without empty shards."""
    return {p: part for p in params if (part := local(p)).numel()}
