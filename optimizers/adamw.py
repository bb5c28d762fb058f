"""AdamW (Loshchilov and Hutter 2019): torch's own fused class.

p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)
"""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup
from torch.optim import AdamW

from optimizers.options import option
from optimizers.roles import Assignment
from optimizers.settings import Settings


@dataclass(frozen=True)
class AdamWConfig(Settings):
    """AdamW on every tensor; only matrices are decayed."""

    lr: float = option(6e-4, "peak learning rate", least=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the first and second moment", least=0, below=1)
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    weight_decay: float = option(0.1, "weight decay of matrices; embeddings, gains and biases are not decayed", least=0)

    def build(
        self, assignments: list[Assignment], process_group: ProcessGroup | None = None, compiled: bool = False
    ) -> AdamW:
        """torch.optim.AdamW, which is fused already and runs on every rank."""
        optimizer = AdamW(self.groups(assignments), lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        for group in optimizer.param_groups:  # torch allocates state at the first step; allocate it now, as we do
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return optimizer
