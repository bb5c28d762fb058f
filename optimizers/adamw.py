"""AdamW (Loshchilov and Hutter 2019): torch's own fused class.

p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.optim import AdamW

from .options import option
from .settings import Settings


@dataclass(frozen=True)
class AdamWConfig(Settings):
    """AdamW on every tensor; only matrices are decayed."""

    lr: float = option(6e-4, "peak learning rate", least=0)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the first and second moment", least=0, below=1)
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    weight_decay: float = option(0.1, "weight decay of matrices; embeddings, gains and biases are not decayed", least=0)


def fused_adamw(
    params: Iterable, process_group: ProcessGroup | None = None, compiled: bool = False, **settings: Any
) -> AdamW:
    """torch.optim.AdamW, which is fused already and runs on every rank. Its state is allocated at once, as ours is."""
    optimizer = AdamW(params, **settings, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
