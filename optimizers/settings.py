"""The base of an algorithm's settings: hyperparameters declared once, and the rule they give each parameter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .directions import Direction
from .options import errors_of, options_of
from .roles import Assignment, grouped

DecayKind = Literal["decoupled", "cautious"]
DECAY_KIND_HELP = "decoupled; cautious: only of weights that the update moves towards zero (arXiv 2510.12402)"


@dataclass(frozen=True)
class Rule:
    """How one tensor is updated in one step: a direction, and the gradient that it receives."""

    direction: Direction
    lr: float
    weight_decay: float
    correction: tuple[float, float] | None = None  # (gamma, beta) of the corrected gradient; None: the raw one
    clip: bool = False  # scale the gradient of each tensor to at most unit norm
    cautious: bool = False  # decay only weights that the update moves towards zero

    def state_names(self, exact: bool) -> list[str]:
        """State tensors of the parameter's shape, among them the gradients that the correction needs."""
        names = list(self.direction.state_names)
        return names if self.correction is None else [*names, "previous", *(["upcoming"] if exact else [])]

    def __str__(self) -> str:
        gradient = "raw" if self.correction is None else ("clipped, " if self.clip else "") + "corrected"
        return f"{self.direction.label} update of the {gradient} gradient"


class Settings:
    """Base of the frozen dataclasses that hold the settings of one algorithm.

    The same dataclass is a section of the command line, the defaults of the optimizer class, and a parameter group.
    With a field `weight_decay_kind: DecayKind`, the algorithm can decay cautiously.
    """

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
        """The optimizer over a model's parameters. Settings of optimizers of other libraries define it themselves.

        process_group: ranks that hold equal gradients and share the work on matrices.
        compiled: compile the elementwise updates.
        Raises ValueError if no optimizer class is registered for these settings.
        """
        make = next((_makers[cls] for cls in type(self).__mro__ if cls in _makers), None)
        if make is None:
            name = type(self).__name__
            raise ValueError(f"{name}: call register(YourOptimizer, {name}()) first, or define build() in {name}")
        return make(self.groups(assignments), process_group=process_group, compiled=compiled, **self.as_group())

    def as_group(self) -> dict[str, Any]:
        """The settings that a parameter group holds."""
        return {key: getattr(self, key) for key, o in options_of(type(self)).items() if not o.run_only}

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Settings":
        """The settings that a parameter group holds."""
        values = {key: group[key] for key, o in options_of(cls).items() if not o.run_only}
        return cls(**{key: _plain(value) for key, value in values.items()})


_makers: dict[type, Callable[..., Optimizer]] = {}  # by the type of settings


def register(make: Callable[..., Optimizer], settings: Settings) -> Settings:
    """Let `build_optimizer` call `make`, an optimizer class, for settings of this type; returns the settings.

    Raises TypeError if `settings` is no object of a class of settings, and ValueError if settings of this type already
    belong to another class.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"register(YourOptimizer, YourSettings()): {settings!r} is no object of a class of settings")
    owner, name = _makers.setdefault(type(settings), make), type(settings).__name__
    if owner is not make:
        raise ValueError(f"{name}: belongs to {owner.__name__}; derive other settings from it for {make.__name__}")
    return settings


def _plain(value: Any) -> Any:
    """A 0-d tensor as a number, also inside a tuple or list."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
