"""What an algorithm prescribes for a tensor, and the hyperparameters everybody checks alike."""

import math
from dataclasses import dataclass
from numbers import Real

from optimizers.directions import Momentum


@dataclass(frozen=True)
class Rule:
    """A gradient estimate times a direction, with numbers: how one tensor is updated in one step."""

    direction: str  # "adaptive", "sign" or "orthogonal"
    lr: float
    weight_decay: float
    correction: tuple[float, float] | None = None  # (gamma, beta) of the corrected gradient; None: the raw one
    clip: bool = False  # scale the estimate to at most unit norm, per tensor
    betas: tuple[float, float] = (0.9, 0.95)  # adaptive
    amsgrad: bool = False  # adaptive
    eps: float = 1e-8  # adaptive: beside sqrt(v_hat); orthogonal: beside the norm
    eps_first: bool = False  # adaptive: eps is added before v's bias correction
    momentum: Momentum | None = None  # sign and orthogonal
    scale: str = "moonlight"  # orthogonal: factor on the learning rate
    ns_steps: int = 5  # orthogonal
    ns_dtype: str = "auto"  # orthogonal

    def __str__(self) -> str:
        estimate = "raw" if self.correction is None else "corrected" + (" clipped" if self.clip else "")
        return f"{estimate} x {self.direction}"

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter, all of its shape."""
        averages = ("exp_avg", "exp_avg_sq") if self.direction == "adaptive" else ("momentum",)
        averages += ("max_exp_avg_sq",) if self.direction == "adaptive" and self.amsgrad else ()
        return averages + (("previous",) if self.correction is not None else ())


def number_faults(**numbers: float) -> list[str]:
    """What is wrong with hyperparameters that must be finite and not negative, a line each."""
    return [
        f"{key}={value}: must be a number >= 0"
        for key, value in numbers.items()
        if not (isinstance(value, Real) and 0 <= value < math.inf)
    ]


def count_faults(**counts: int) -> list[str]:
    """What is wrong with hyperparameters that must be whole numbers from 1 on, a line each."""
    return [
        f"{key}={value}: must be a whole number of at least 1"
        for key, value in counts.items()
        if type(value) is not int or value < 1
    ]


def fraction_faults(**numbers: float | tuple[float, ...]) -> list[str]:
    """What is wrong with hyperparameters, or pairs of them, that must lie in [0, 1), a line each."""
    out = []
    for key, value in numbers.items():
        values = value if isinstance(value, tuple | list) else (value,)
        pair = "betas" in key
        if not all(isinstance(v, Real) and 0 <= v < 1 for v in values) or (pair and len(values) != 2):
            out.append(f"{key}={value}: must be {'two numbers' if pair else 'a number'} in [0, 1)")
    return out


def choice_faults(**choices: tuple[object, tuple]) -> list[str]:
    """What is wrong with (value, allowed values) hyperparameters, a line each."""
    return [
        f"{key}={value!r}: must be one of {', '.join(map(str, allowed))}"
        for key, (value, allowed) in choices.items()
        if value not in allowed
    ]
