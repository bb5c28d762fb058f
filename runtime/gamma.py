"""gamma=auto: the strength of MARS-M's correction, chosen during training (experimental).

Without clipping, MARS-M moves along (1 - gamma) M + gamma g, where M averages gradients g with decay beta. Its squared
distance to the full gradient F is, relative to the noise s2 = E|g - F|^2,

    A (1 - gamma)^2 + 2 gamma (1 - gamma) (1 - beta) + gamma^2    with A = E|M - F|^2 / s2,

which is smallest at gamma = (A - (1 - beta)) / (A - 2 (1 - beta) + 1), or at 0 if A < 1 - beta. Every few steps A is
estimated from the gradients g1, g2 of the two halves of the batch, g = (g1 + g2) / 2, and from M before the step:

    s2 = E|g1 - g2|^2 / 4,    |M - F|^2 = E(M - g1).(M - g2) = E|M - g|^2 - s2,
    A = beta^2 |M - F|^2 / s2 + (1 - beta)^2.

The halves are independent given the weights, so both estimates are unbiased. Sums run over all weight matrices.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.distributed import World

EVERY = 16  # steps between estimates, of which each waits for the device once
SMOOTHING = 0.9  # decay of the averages of s2 and of |M - F|^2
LARGEST = 0.5


def best_gamma(a: float, beta: float) -> float:
    """The gamma in [0, 1] with the smallest error of the momentum for a given A; see the top of this file."""
    return min(1.0, max(0.0, (a - (1 - beta)) / (a - 2 * (1 - beta) + 1)))


def copied_bytes(optimizer: Optimizer) -> int:
    """Bytes of the gradients that this rank copies in a step with an estimate."""
    matrices = (p for group in optimizer.param_groups if group["role"] == "matrix" for p in group["params"])
    return sum(p.nbytes for p in matrices if p in optimizer.state)


class GammaTuner:
    """Estimates A and sets the gamma of every parameter group that has one.

    saved: `state()` of the run that is resumed. A step with an estimate needs more memory: one copy of the gradients
    of the weight matrices, divided over the ranks.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, world: World, saved: dict[str, float] | None) -> None:
        self.optimizer: Any = optimizer
        self.world = world
        names = {p: name for name, p in model.named_parameters()}
        self.groups = [group for group in optimizer.param_groups if group["role"] == "matrix"]
        self.matrices = sorted((p for group in self.groups for p in group["params"]), key=names.__getitem__)
        self.beta, self.gamma = self.groups[0]["momentum"], self.groups[0]["gamma"]
        self.noise = self.distance = 0.0  # averages of s2 and |M - F|^2; only their ratio is used
        self.halves: dict[Tensor, Tensor] = {}
        if saved:
            self.noise, self.distance = saved["noise"], saved["distance"]
            self.set_gamma()

    def due(self, step: int) -> bool:
        """Whether the update number `step` (from 0) has an estimate."""
        return step > 0 and step % EVERY == 0

    def keep_first_half(self) -> None:
        """Keep the present gradients, those of the first half of the batch; they are g1 / 2."""
        self.halves = {p: p.grad.clone() for p in self.matrices if p in self.optimizer.state and p.grad is not None}

    @torch.no_grad()
    def estimate(self, step: int, clipped: Tensor | float = 1.0) -> None:
        """Update A and gamma from the present gradients g, which were multiplied by `clipped` to clip them."""
        sums = torch.zeros(2, len(self.matrices), dtype=torch.float64, device=self.world.device)
        for i, p in enumerate(self.matrices):  # one place per matrix: the sum does not depend on the number of ranks
            if p in self.halves and p.grad is not None:
                g, half = p.grad, self.halves[p] * clipped
                average = self.optimizer.state[p]["momentum"] / (1 - self.beta**step)
                sums[0, i] = (2 * half - g).square().sum()
                sums[1, i] = (average - g).square().sum()
        self.halves = {}
        noise, both = self.world.sum(sums).sum(dim=1).tolist()
        if math.isfinite(noise + both):
            self.noise = SMOOTHING * self.noise + (1 - SMOOTHING) * noise
            self.distance = SMOOTHING * self.distance + (1 - SMOOTHING) * (both - noise)
            self.set_gamma()

    @property
    def a(self) -> float:
        """The present estimate of A."""
        return self.beta**2 * max(0.0, self.distance) / max(self.noise, 1e-30) + (1 - self.beta) ** 2

    def set_gamma(self) -> None:
        """Set gamma from the present estimate."""
        self.gamma = min(LARGEST, best_gamma(self.a, self.beta))
        for group in self.groups:
            group["gamma"] = self.gamma

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(noise=self.noise, distance=self.distance)
