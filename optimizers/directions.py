"""Directions: how a gradient moves a weight. A direction updates its own averages and the weight, nothing else.

The gradient that a direction receives may already be corrected (variance reduction) and clipped. Every number that
may change during a run enters as a 0-d tensor, so a compiled update is compiled once and the host never waits for
the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]  # state tensors of one parameter, by name


@dataclass(frozen=True)
class Step:
    """What a direction has to know of the coming step."""

    take: Tensor  # 0-d float64: 1, or 0 if the step is skipped because a gradient is not finite
    count: Tensor  # 0-d float64: number of this step, from 1; 1 for directions that do not count steps
    lr: float
    weight_decay: float
    index: int = 1  # for matrices: number of the parameter's calls, from 1, skipped ones included; known to the host

    def weight(self, x: float | Tensor) -> Tensor:
        """A mixing weight that is 0 in a skipped step, for `average.lerp_(new, weight)`."""
        return self.take * x

    @property
    def decay(self) -> Tensor:
        """What decoupled weight decay multiplies a weight with; 1 in a skipped step."""
        return 1 - self.take * (self.lr * self.weight_decay)

    @property
    def rate(self) -> Tensor:
        """The learning rate; 0 in a skipped step."""
        return self.take * self.lr


class Direction:
    """Base of the directions, which are frozen dataclasses of their own hyperparameters.

    A subclass names its state tensors, turns its hyperparameters into the numbers of a step, and updates with them.
    `numbers` runs once a step; `update` runs for every parameter, possibly compiled, possibly block by block, so it
    must be elementwise. A skipped step must change nothing: use `step.weight`, `step.decay` and `step.rate`.
    """

    label: ClassVar[str]  # the direction's name in the table of parameters
    state_names: tuple[str, ...]  # state tensors of the parameter's shape, in the order that `update` receives them
    counts_steps: ClassVar[bool] = False  # whether `numbers` reads step.count

    def state(self, p: Tensor, blocks: int = 1) -> State:
        """State of a parameter before its first step. blocks: row blocks that a matrix is treated as."""
        return {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name in self.state_names}

    def numbers(self, step: Step) -> NamedTuple:
        """The 0-d tensors of a step; the caller converts them to the parameters' dtype."""
        raise NotImplementedError

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: Any, scratch: Tensor | None) -> None:
        """Update p and its state in place; `gradient` may be overwritten.

        n: the result of `numbers`. scratch: memory of the same shape to work in, or None.
        """
        raise NotImplementedError

    def cpu_kernel(self, step: Step) -> Callable[[Tensor, Tensor, list[Tensor]], None] | None:
        """`update` as one kernel for contiguous tensors on a CPU in eager mode, if there is one."""
        return None


class MatrixNumbers(NamedTuple):
    """What every rank needs to move a matrix."""

    decay: Tensor
    rate: Tensor


class MatrixDirection(Direction):
    """Base of the directions that need a whole matrix. Every matrix is worked on by the rank that owns it.

    `accumulate` runs first, elementwise, for every matrix; `directions` then sees a stack of its results. The
    weights move by -lr * scale * direction on every rank.
    """

    def numbers(self, step: Step) -> Any:
        """The 0-d tensors that `accumulate` needs, among them the rate and decay of the weights."""
        return MatrixNumbers(step.decay, step.rate)

    @staticmethod
    def accumulate(gradient: Tensor, state: list[Tensor], n: Any, out: Tensor) -> None:
        """Update elementwise state and fill `out`, which `directions` receives; by default with the gradient."""
        out.copy_(gradient)

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        """Directions (count, m, n) of a stack of matrices (count, m, n) with m <= n, the tall ones transposed.

        states: of the parameters in the stack; a parameter in several blocks has as many consecutive matrices.
        """
        raise NotImplementedError

    def shared_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype in which ranks exchange directions."""
        return torch.float32

    def scale(self, rows: int, columns: int) -> float:
        """Factor on the learning rate of a matrix (rows, columns)."""
        return 1.0

    def cost(self, rows: int, columns: int) -> float:
        """Relative work on a matrix, by which ranks share the matrices evenly."""
        small, large = sorted((rows, columns))
        return small * small * (2 * large + small)


LARGEST_SQUARED = 1e18  # gradients are cut off here before they are squared; an infinite average would never recover


class AdaptiveNumbers(NamedTuple):
    """Numbers of `Adaptive.update`, which divides by `root_factor` sqrt(v) + `eps_term`."""

    decay: Tensor
    weight1: Tensor
    weight2: Tensor
    root_factor: Tensor
    eps_term: Tensor


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
        """lr m_hat / (sqrt(v_hat) + eps) = m / (root_factor sqrt(v) + eps_term).

        root_factor = correction1 / (lr sqrt(correction2)); eps_term = eps correction1 / lr, or eps root_factor if
        eps is added first. The term is infinite where the weight must not move.
        """
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**step.count, 1 - beta2**step.count
        lr = step.lr or 1.0
        root_factor = correction1 / correction2.sqrt() / lr
        eps_term = self.eps * root_factor if self.eps_first else self.eps * correction1 / lr
        moves = step.take > 0 if step.lr else torch.zeros_like(step.take, dtype=torch.bool)
        eps_term = torch.where(moves, eps_term, torch.inf)
        return AdaptiveNumbers(step.decay, step.weight(1 - beta1), step.weight(1 - beta2), root_factor, eps_term)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: AdaptiveNumbers, scratch: Tensor | None) -> None:
        m, v, *largest = state
        gradient.clamp_(-LARGEST_SQUARED, LARGEST_SQUARED)
        m.lerp_(gradient, n.weight1)
        v.lerp_(torch.mul(gradient, gradient, out=gradient), n.weight2)
        v_used = torch.maximum(largest[0], v, out=largest[0]) if largest else v
        Adaptive.move(p, m, v_used, n, scratch)

    @staticmethod
    def move(p: Tensor, m: Tensor, v: Tensor, n: AdaptiveNumbers, scratch: Tensor | None) -> None:
        """Decay p and move it by both averages."""
        denominator = torch.sqrt(v, out=scratch).mul_(n.root_factor).add_(n.eps_term)
        p.mul_(n.decay).addcdiv_(m, denominator, value=-1)

    def cpu_kernel(self, step: Step) -> Callable[[Tensor, Tensor, list[Tensor]], None] | None:
        """The kernel of torch's fused AdamW: one pass over memory where `update` makes eight."""
        if self.eps_first:
            return None
        count, skip = step.count.float(), 1 - step.take.float()
        beta1, beta2 = self.betas
        numbers: dict[str, Any] = dict(lr=step.lr, beta1=beta1, beta2=beta2, weight_decay=step.weight_decay)
        numbers |= dict(eps=self.eps, maximize=False, amsgrad=self.amsgrad, found_inf=skip)

        def kernel(p: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
            m, v, *largest = ([t] for t in state)
            gradient.clamp_(-LARGEST_SQUARED, LARGEST_SQUARED)
            torch._fused_adamw_([p], [gradient], m, v, largest[0] if largest else [], [count], **numbers)

        return kernel


@dataclass(frozen=True)
class AdaptiveByRaw(Adaptive):
    """Adam whose m averages the corrected gradient and whose v averages the square of the raw one.

    The raw gradient is the state "previous", where the approximate form of MARS has just put it for the next step.
    """

    label = "adaptive by raw"
    state_names = ("exp_avg", "exp_avg_sq", "previous")

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: AdaptiveNumbers, scratch: Tensor | None) -> None:
        m, v, raw = state
        m.lerp_(gradient.clamp_(-LARGEST_SQUARED, LARGEST_SQUARED), n.weight1)
        torch.clamp(raw, -LARGEST_SQUARED, LARGEST_SQUARED, out=gradient)
        v.lerp_(gradient.mul_(gradient), n.weight2)
        Adaptive.move(p, m, v, n, scratch)

    def cpu_kernel(self, step: Step) -> None:
        return None


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


def average_and_gradient(beta: float, gamma: float) -> Momentum:
    """M <- beta M + (1 - beta) g; direction of (1 - gamma) M + gamma g.

    At constant gamma this equals `corrected_average`, with n = (1 - gamma) M. M is free of gamma, which may change.
    """
    return Momentum((beta, 1 - beta), (beta * (1 - gamma), 1 - beta + beta * gamma))


def interpolated(beta1: float, beta2: float) -> Momentum:
    """m <- beta2 m + (1 - beta2) g; direction of beta1 m_old + (1 - beta1) g (Lion)."""
    return Momentum((beta2, 1 - beta2), (beta1, 1 - beta1))


class MomentumNumbers(NamedTuple):
    """Numbers of `mix` and of the update that follows it."""

    decay: Tensor
    rate: Tensor
    stored_momentum: Tensor
    stored_gradient: Tensor
    used_momentum: Tensor
    used_gradient: Tensor


def momentum_numbers(momentum: Momentum, step: Step) -> MomentumNumbers:
    """The numbers of a momentum step; a skipped step keeps the momentum."""
    return MomentumNumbers(
        step.decay,
        step.rate,
        1 - step.weight(1 - momentum.stored[0]),
        step.weight(momentum.stored[1]),
        step.weight(momentum.used[0]),
        step.weight(momentum.used[1]),
    )


def mix(gradient: Tensor, m: Tensor, n: MomentumNumbers, out: Tensor) -> Tensor:
    """Update the momentum m in place; fill and return `out`, which gives the direction. All of one shape."""
    torch.mul(m, n.used_momentum, out=out).addcmul_(gradient, n.used_gradient)
    m.mul_(n.stored_momentum).addcmul_(gradient, n.stored_gradient)
    return out


@dataclass(frozen=True)
class Sign(Direction):
    """Lion's direction (Chen et al. 2023): p <- (1 - lr wd) p - lr sign(momentum)."""

    momentum: Momentum
    label = "sign"
    state_names = ("momentum",)

    def numbers(self, step: Step) -> MomentumNumbers:
        return momentum_numbers(self.momentum, step)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: MomentumNumbers, scratch: Tensor | None) -> None:
        used = mix(gradient, state[0], n, out=torch.empty_like(gradient))
        p.mul_(n.decay).addcmul_(used.sign_(), n.rate, value=-1)
