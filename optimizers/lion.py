"""Lion (Chen et al. 2023, arXiv 2302.06675): the raw gradient times the sign direction.

u = sign(beta1 m + (1 - beta1) g);  p <- (1 - lr wd) p - lr u;  m <- beta2 m + (1 - beta2) g
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from optimizers.composed import ComposedOptimizer
from optimizers.directions import interpolated
from optimizers.roles import Claim, grouped
from optimizers.rules import Rule, fraction_faults, number_faults


class Lion(ComposedOptimizer):
    """Lion. params: parameters or groups; groups may set every argument for themselves. State: 4 bytes a parameter."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), compiled=compiled)

    def faults(self, group: dict[str, Any]) -> list[str]:
        return number_faults(lr=group["lr"], weight_decay=group["weight_decay"]) + fraction_faults(betas=group["betas"])

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        return Rule("sign", group["lr"], group["weight_decay"], momentum=interpolated(*group["betas"]))


@dataclass(frozen=True)
class LionConfig:
    """Lion on every tensor; only matrices are decayed."""

    lr: float = 1e-4  # peak learning rate; about a tenth of AdamW's
    betas: tuple[float, float] = (0.95, 0.98)  # interpolation and momentum: the Lion paper's for language models
    weight_decay: float = 1.0  # of matrices; about ten times AdamW's, so that lr x decay stays

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        return number_faults(lr=self.lr, weight_decay=self.weight_decay) + fraction_faults(betas=self.betas)

    def build(self, claims: list[Claim], group: ProcessGroup | None = None, compiled: bool = False) -> Lion:
        """Lion over the claimed parameters."""
        groups = grouped(claims, weight_decay={"matrix": self.weight_decay, "embedding": 0.0, "vector": 0.0})
        return Lion(groups, self.lr, self.betas, compiled=compiled)
