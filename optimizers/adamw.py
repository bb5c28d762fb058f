"""AdamW (Loshchilov and Hutter 2019): torch's own fused class."""

from dataclasses import dataclass

import torch

from optimizers.roles import Claim


@dataclass(frozen=True)
class AdamWConfig:
    """p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps), decay on matrices only."""

    lr: float = 6e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; embeddings, gains and biases are not decayed

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        out = [f"{k}={v}: must be >= 0" for k in ("lr", "eps", "weight_decay") if not (v := getattr(self, k)) >= 0]
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            out.append(f"betas={self.betas}: must be two numbers in [0, 1)")
        return out

    def build(self, claims: list[Claim]) -> torch.optim.Optimizer:
        """torch.optim.AdamW over the claimed parameters."""
        groups = [
            {
                "params": [c.param for c in claims if (c.role == "matrix") == decayed],
                "weight_decay": self.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
