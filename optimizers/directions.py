"""Directions: how a gradient moves a weight. A direction updates its own averages and the weight, nothing else.

The gradient that a direction receives may already be corrected (variance reduction) and clipped. `numbers` computes on
the host, as floats, every number of a step. A compiled update receives them as 0-d tensors on the CPU, so that another
learning rate does not compile again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]  # state tensors of one parameter, by name


@dataclass(frozen=True)
class Step:
    """What a direction has to know of the coming step."""

    count: int  # number of the parameter's step, from 1; always 1 for directions that do not count steps
    lr: float
    weight_decay: float

    @property
    def decay(self) -> float:
        """What decoupled weight decay multiplies a weight with."""
        return 1 - self.lr * self.weight_decay


class Direction:
    """Base of the directions, which are frozen dataclasses of their own hyperparameters.

    A subclass names its state tensors, turns its hyperparameters into the numbers of a step, and updates with them.
    `numbers` runs once a step; `update` runs for every parameter, possibly compiled, possibly block by block, so it
    must be elementwise.
    """

    label: ClassVar[str]  # the direction's name in the table of parameters
    state_names: tuple[str, ...]  # state tensors of the parameter's shape, in the order that `update` receives them
    counts_steps: ClassVar[bool] = False  # whether the direction reads step.count

    def owner_state(self, p: Tensor, blocks: int) -> State:
        """State of other shapes than the parameter's, before the first step; only the owner of a matrix keeps it.

        p: tells shape, dtype and device, and has no values. blocks: row blocks that a matrix is treated as.
        """
        return {}

    def numbers(self, step: Step) -> Any:
        """The numbers of a step, a NamedTuple of floats."""
        raise NotImplementedError

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: Any) -> None:
        """Update p and its state in place; `gradient`, a copy, may be overwritten. n: the result of `numbers`.

        What is added to p must not depend on p, except for the decay: for cautious decay, p is zero and n has none.
        """
        raise NotImplementedError


def add_scaled_(x: Tensor, y: Tensor, factor: Any) -> Tensor:
    """x <- x + factor y, with a float, or in compiled code a 0-d tensor, which `alpha` does not take."""
    return x.add_(y * factor) if isinstance(factor, Tensor) else x.add_(y, alpha=factor)


def move_(p: Tensor, update: Tensor, decay: Any, rate: Any) -> None:
    """p <- decay p - rate update, with numbers as above."""
    p.mul_(decay)
    p.sub_(update * rate) if isinstance(rate, Tensor) else p.sub_(update, alpha=rate)


class MatrixNumbers(NamedTuple):
    """What every rank needs to move a matrix."""

    decay: float
    rate: float


class MatrixDirection(Direction):
    """Base of the directions that need a whole matrix. Every matrix is worked on by the rank that owns it.

    `accumulate` runs first, elementwise, for every matrix; `directions` then sees a stack of its results. The
    weights move by -lr * scale * direction on every rank.
    """

    def numbers(self, step: Step) -> Any:
        """The numbers that `accumulate` needs, among them the rate and decay of the weights."""
        return MatrixNumbers(step.decay, step.lr)

    @staticmethod
    def accumulate(gradient: Tensor, state: list[Tensor], n: Any, out: Tensor) -> None:
        """Update elementwise state and fill `out`, which `directions` receives; by default with the gradient."""
        out.copy_(gradient)

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        """Directions (count, m, n) of a stack of matrices (count, m, n) with m <= n, the tall ones transposed.

        states: of the parameters in the stack; a parameter in several blocks has as many consecutive matrices.
        """
        raise NotImplementedError

    def shared_dtype(self, p: Tensor) -> torch.dtype:
        """The dtype in which ranks exchange the directions of a parameter."""
        return p.dtype

    def scale(self, rows: int, columns: int) -> float:
        """Factor on the learning rate of a matrix (rows, columns)."""
        return 1.0

    def cost(self, rows: int, columns: int) -> float:
        """Relative work on a matrix, by which ranks share the matrices evenly."""
        small, large = sorted((rows, columns))
        return small * small * (2 * large + small)


class AdaptiveNumbers(NamedTuple):
    """Numbers of `Adaptive.update`."""

    decay: float
    rate: float  # lr / (1 - beta1^t)
    weight1: float
    weight2: float
    root: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@dataclass(frozen=True)
class Adaptive(Direction):
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)

    amsgrad: divide by the running maximum of v. eps_first: add eps before the bias correction of v.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    amsgrad: bool = False
    eps_first: bool = False
    label = "adaptive"
    counts_steps = True

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())

    def numbers(self, step: Step) -> AdaptiveNumbers:
        beta1, beta2 = self.betas
        rate, root = step.lr / (1 - beta1**step.count), (1 - beta2**step.count) ** -0.5
        eps = self.eps * root if self.eps_first else self.eps
        return AdaptiveNumbers(step.decay, rate, 1 - beta1, 1 - beta2, root, eps)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: AdaptiveNumbers) -> None:
        m, v, *largest = state
        m.lerp_(gradient, n.weight1)
        v.lerp_(gradient.mul_(gradient), n.weight2)
        Adaptive.move(p, m, torch.maximum(largest[0], v, out=largest[0]) if largest else v, n)

    @staticmethod
    def move(p: Tensor, m: Tensor, v: Tensor, n: AdaptiveNumbers) -> None:
        """Decay p and move it by both averages."""
        move_(p, m / v.sqrt().mul_(n.root).add_(n.eps), n.decay, n.rate)


@dataclass(frozen=True)
class AdaptiveByRaw(Adaptive):
    """Adam whose m averages the corrected gradient and whose v averages the square of the raw one.

    The raw gradient is the state "previous", where the approximate form of MARS has just put it for the next step.
    """

    label = "raw-normalized adaptive"
    state_names = ("exp_avg", "exp_avg_sq", "previous")

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: AdaptiveNumbers) -> None:
        m, v, raw = state
        m.lerp_(gradient, n.weight1)
        v.lerp_(raw * raw, n.weight2)
        Adaptive.move(p, m, v, n)


@dataclass(frozen=True)
class Momentum:
    """Two mixtures of the old momentum and the gradient: the stored momentum, and the one that gives the direction."""

    stored: tuple[float, float]  # new momentum = stored[0] * momentum + stored[1] * gradient
    used: tuple[float, float]  # the direction is that of used[0] * momentum + used[1] * gradient


def summed(beta: float, nesterov: bool = False) -> Momentum:
    """m <- beta m + g; direction of m, or with Nesterov of g + beta m (Muon)."""
    return Momentum((beta, 1.0), (beta * beta, 1 + beta) if nesterov else (beta, 1.0))


def averaged(beta: float) -> Momentum:
    """m <- beta m + (1 - beta) g; direction of m (MARS, MARS-M)."""
    return Momentum((beta, 1 - beta), (beta, 1 - beta))


def corrected_average(beta: float, gamma: float) -> Momentum:
    """n <- beta n + (1 - beta)(1 - gamma) g; direction of n + gamma g.

    At constant gamma this equals `averaged` on the corrected gradient without clipping, with n = m - gamma g, so the
    previous gradient need not be kept.
    """
    weight = (1 - beta) * (1 - gamma)
    return Momentum((beta, weight), (beta, weight + gamma))


def interpolated(beta1: float, beta2: float) -> Momentum:
    """m <- beta2 m + (1 - beta2) g; direction of beta1 m_old + (1 - beta1) g (Lion)."""
    return Momentum((beta2, 1 - beta2), (beta1, 1 - beta1))


class MomentumNumbers(NamedTuple):
    """Numbers of `mix` and of the update that follows it."""

    decay: float
    rate: float
    stored_momentum: float
    stored_gradient: float
    used_momentum: float
    used_gradient: float


def momentum_numbers(momentum: Momentum, step: Step) -> MomentumNumbers:
    """The numbers of a momentum step."""
    return MomentumNumbers(step.decay, step.lr, *momentum.stored, *momentum.used)


def mix(gradient: Tensor, m: Tensor, n: MomentumNumbers, out: Tensor | None = None) -> Tensor:
    """Update the momentum m in place; returns the mixture that gives the direction, in `out` if given."""
    used = add_scaled_(torch.mul(m, n.used_momentum, out=out), gradient, n.used_gradient)
    add_scaled_(m.mul_(n.stored_momentum), gradient, n.stored_gradient)
    return used


@dataclass(frozen=True)
class Sign(Direction):
    """Lion's direction (Chen et al. 2023): p <- (1 - lr wd) p - lr sign(momentum)."""

    momentum: Momentum
    label = "sign"
    state_names = ("momentum",)

    def numbers(self, step: Step) -> MomentumNumbers:
        return momentum_numbers(self.momentum, step)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: MomentumNumbers) -> None:
        move_(p, mix(gradient, state[0], n).sign_(), n.decay, n.rate)
