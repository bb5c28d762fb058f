"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): Adam with a second, slow average of the gradient.

m1 <- beta1 m1 + (1 - beta1) g;  m2 <- beta3(t) m2 + (1 - beta3(t)) g;  v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr wd) p - lr (m1_hat + alpha(t) m2) / (sqrt(v_hat) + eps)

Over the first T steps alpha rises linearly to alpha, and beta3 from beta1 to beta3 so that its half-life rises
linearly (the paper's equations for the schedulers of alpha and beta3).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.composed import ComposedOptimizer
from optimizers.directions import LARGEST_SQUARED, Direction, Step
from optimizers.options import option
from optimizers.settings import Rule, Settings


class Numbers(NamedTuple):
    """Numbers of `TwoAverages.update`."""

    decay: Tensor
    rate: Tensor
    weight1: Tensor
    weight2: Tensor
    weight3: Tensor
    alpha: Tensor
    correction1: Tensor  # 1 - beta1^t
    root_correction2: Tensor  # sqrt(1 - beta2^t)
    eps: Tensor


@dataclass(frozen=True)
class TwoAverages(Direction):
    """The direction of AdEMAMix."""

    betas: tuple[float, float]
    beta3: float
    alpha: float
    eps: float
    warmup: int
    label = "adaptive, two averages"
    counts_steps = True
    state_names = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def numbers(self, step: Step) -> Numbers:
        beta1, beta2 = self.betas
        progress = (step.count / max(1, self.warmup)).clamp(max=1.0)
        beta3 = torch.full_like(progress, self.beta3)
        if self.warmup and 0 < beta1 < self.beta3:
            start, end = math.log(beta1), math.log(self.beta3)
            beta3 = (start * end / ((1 - progress) * end + progress * start)).exp()
        weights = (step.weight(1 - beta1), step.weight(1 - beta2), step.weight(1 - beta3))
        corrections = (1 - beta1**step.count, (1 - beta2**step.count).sqrt())
        eps = torch.full_like(progress, self.eps)
        return Numbers(step.decay, step.rate, *weights, self.alpha * progress, *corrections, eps)

    @staticmethod
    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: Numbers, scratch: Tensor | None) -> None:
        m1, m2, v = state
        gradient.clamp_(-LARGEST_SQUARED, LARGEST_SQUARED)
        m1.lerp_(gradient, n.weight1)
        m2.lerp_(gradient, n.weight3)
        v.lerp_(gradient * gradient, n.weight2)
        denominator = v.sqrt().div_(n.root_correction2).add_(n.eps)
        p.mul_(n.decay).sub_((m1 / n.correction1 + n.alpha * m2).div_(denominator).mul_(n.rate))


@dataclass(frozen=True)
class AdEMAMixConfig(Settings):
    """AdEMAMix on every tensor; only matrices are decayed. Defaults: the paper's language models."""

    lr: float = option(6e-4, "peak learning rate", least=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the fast average, of the square", least=0, below=1)
    beta3: float = option(0.9999, "decay of the slow average", least=0, below=1)
    alpha: float = option(8.0, "weight of the slow average", least=0)
    slow_warmup: int = option(0, "steps over which alpha and beta3 rise; the paper takes the whole run", least=0)
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    weight_decay: float = option(0.1, "weight decay of matrices", least=0)

    def rule(self, role: str, lr_factor: float) -> Rule:
        direction = TwoAverages(self.betas, self.beta3, self.alpha, self.eps, self.slow_warmup)
        return Rule(direction, self.lr, self.weight_decay)


class AdEMAMix(ComposedOptimizer):
    """AdEMAMix. State: 12 bytes a parameter."""

    settings = AdEMAMixConfig
