"""AdamW (Loshchilov and Hutter 2019): torch's own fused class.

p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)
"""

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.optim import AdamW

from optimizers.roles import Claim, grouped
from optimizers.rules import fraction_faults, number_faults


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW on every tensor; only matrices are decayed."""

    lr: float = 6e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    eps: float = 1e-8  # added to sqrt(v_hat)
    weight_decay: float = 0.1  # of matrices; embeddings, gains and biases are not decayed

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        numbers = number_faults(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        return numbers + fraction_faults(betas=self.betas)

    def build(self, claims: list[Claim], group: ProcessGroup | None = None, compiled: bool = False) -> AdamW:
        """torch.optim.AdamW over the claimed parameters; it is fused already and replicated on every rank."""
        groups = grouped(claims, weight_decay={"matrix": self.weight_decay, "embedding": 0.0, "vector": 0.0})
        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
