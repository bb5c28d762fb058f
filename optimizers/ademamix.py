"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): Adam with a second, slow average of the gradient.

m1 <- beta1 m1 + (1 - beta1) g;  m2 <- beta3(t) m2 + (1 - beta3(t)) g;  v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr wd) p - lr (m1_hat + alpha(t) m2) / (sqrt(v_hat) + eps)

Over the first T steps alpha rises linearly to alpha, and beta3 from beta1 to beta3 so that its half-life rises
linearly (the paper's equations for the schedulers of alpha and beta3).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Direction, Step, move_
from .options import option
from .settings import DECAY_KIND_HELP, DecayKind, Rule, Settings
from .signatures import arguments


class Numbers(NamedTuple):
    """Numbers of `TwoAverages.update`."""

    decay: float
    rate: float
    weight1: float
    weight2: float
    weight3: float
    alpha: float
    inverse: float  # 1 / (1 - beta1^t)
    root: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@dataclass(frozen=True)
class TwoAverages(Direction):
    """The direction of AdEMAMix."""

    betas: tuple[float, float]
    beta3: float
    alpha: float
    eps: float
    warmup: int
    label = "two-average adaptive"
    counts_steps = True
    state_names = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def numbers(self, step: Step) -> Numbers:
        (beta1, beta2), beta3 = self.betas, self.beta3
        progress = min(1.0, step.count / max(1, self.warmup))
        if progress < 1:  # as in the authors' code, the half-life of beta1 = 0 is that of 1e-8
            start, end = math.log(max(beta1, 1e-8)), math.log(max(beta3, 1e-8))
            beta3 = math.exp(start * end / ((1 - progress) * end + progress * start))
        inverse, root = 1 / (1 - beta1**step.count), (1 - beta2**step.count) ** -0.5
        weights, alpha = (1 - beta1, 1 - beta2, 1 - beta3), self.alpha * progress
        return Numbers(step.decay, step.lr, *weights, alpha, inverse, root, self.eps)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: Numbers) -> None:
        m1, m2, v = state
        m1.lerp_(gradient, n.weight1)
        m2.lerp_(gradient, n.weight3)
        v.lerp_(gradient.mul_(gradient), n.weight2)
        denominator = v.sqrt().mul_(n.root).add_(n.eps)
        move_(p, (m1 * n.inverse).add_(m2 * n.alpha).div_(denominator), n.decay, n.rate)


@dataclass(frozen=True)
class AdEMAMixConfig(Settings):
    """AdEMAMix on every tensor; only matrices are decayed. Defaults: the paper's language models."""

    lr: float = option(6e-4, "peak learning rate", least=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the fast average, of the square", least=0, below=1)
    beta3: float = option(0.9999, "decay of the slow average", least=0, below=1)
    alpha: float = option(8.0, "weight of the slow average", least=0)
    slow_warmup: int = option(0, "steps over which alpha and beta3 rise; the paper takes the whole run", least=0)
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    weight_decay: float = option(0.1, "weight decay; the trainer decays only matrices", least=0)
    weight_decay_kind: DecayKind = option("decoupled", DECAY_KIND_HELP)

    def rule(self, role: str, lr_factor: float) -> Rule:
        direction = TwoAverages(self.betas, self.beta3, self.alpha, self.eps, self.slow_warmup)
        return Rule(direction, self.lr, self.weight_decay)


class AdEMAMix(ComposedOptimizer):
    """AdEMAMix. State: 12 bytes a parameter."""

    settings = AdEMAMixConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9999,
        alpha: float = 8.0,
        slow_warmup: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        weight_decay_kind: DecayKind = "decoupled",
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
