"""The base of an algorithm's settings: hyperparameters declared once, and the rule they give each parameter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from optimizers.directions import Direction
from optimizers.options import errors_of, options_of
from optimizers.roles import Assignment, grouped


@dataclass(frozen=True)
class Rule:
    """How one tensor is updated in one step: a gradient, raw or corrected, and a direction."""

    direction: Direction
    lr: float
    weight_decay: float
    correction: tuple[float, float] | None = None  # (gamma, beta) of the corrected gradient; None: the raw one
    clip: bool = False  # scale the gradient of each tensor to at most unit norm

    def __str__(self) -> str:
        gradient = "raw" if self.correction is None else "corrected" + (" clipped" if self.clip else "")
        return f"{gradient} x {self.direction.label}"


class Settings:
    """Base of the frozen dataclasses that hold the settings of one algorithm.

    The same dataclass is a section of the command line, the defaults of the optimizer class, and a parameter group.
    """

    optimizer: ClassVar[Callable[..., Optimizer] | None] = None  # the class that these settings configure
    added_later: ClassVar[tuple[str, ...]] = ()  # keys that an older state_dict may lack; they get their default
    lr: float
    weight_decay: float

    def errors(self) -> list[str]:
        """Everything wrong with these settings, one line each."""
        return errors_of(self)

    def changed(self, **changes: Any) -> "Settings":
        """A copy with other values."""
        return replace(self, **changes)  # type: ignore[type-var]  # every subclass is a dataclass

    def rule(self, role: str, lr_factor: float) -> Rule:
        """The rule for a parameter of a role: "matrix", "embedding" or "vector".

        lr_factor: the group's present learning rate relative to the one at construction, for rules with a rate of
        their own.
        """
        raise NotImplementedError

    def groups(self, assignments: list[Assignment]) -> list[dict[str, Any]]:
        """Parameter groups of a run; by default only matrices are decayed."""
        return grouped(assignments, weight_decay={"matrix": self.weight_decay, "embedding": 0.0, "vector": 0.0})

    def build(
        self, assignments: list[Assignment], process_group: ProcessGroup | None = None, compiled: bool = False
    ) -> Optimizer:
        """The optimizer over a model's parameters.

        process_group: ranks that hold equal gradients and share the work on matrices.
        compiled: compile the elementwise updates.
        """
        assert self.optimizer is not None, f"{type(self).__name__} must name its optimizer class, or define build()"
        groups, settings = self.groups(assignments), self.as_group()
        return self.optimizer(groups, process_group=process_group, compiled=compiled, **settings)

    def as_group(self) -> dict[str, Any]:
        """The settings that a parameter group holds."""
        return {key: getattr(self, key) for key, (_, o) in options_of(type(self)).items() if not o.run_only}

    def moving(self) -> dict[str, float]:
        """Hyperparameters that move linearly over a run, with their final values."""
        return {}

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Settings":
        """The settings that a parameter group holds."""
        values = {key: group[key] for key, (_, o) in options_of(cls).items() if not o.run_only}
        return cls(**{key: _plain(value) for key, value in values.items()})


def _plain(value: Any) -> Any:
    """A 0-d tensor as a number, also inside a tuple or list."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
