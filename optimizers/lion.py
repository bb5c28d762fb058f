"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum.

p <- (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g
"""

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Sign, interpolated
from .options import option
from .settings import DECAY_KIND_HELP, DecayKind, Rule, Settings
from .signatures import arguments


@dataclass(frozen=True)
class LionConfig(Settings):
    """Lion on every tensor; only matrices are decayed."""

    lr: float = option(1e-4, "peak learning rate; about a tenth of AdamW's", least=0)
    betas: tuple[float, float] = option(
        (0.95, 0.98), "interpolation and decay of the momentum; the Lion paper's for language models", least=0, below=1
    )
    weight_decay: float = option(
        1.0, "weight decay, about ten times AdamW's; the trainer decays only matrices", least=0
    )
    weight_decay_kind: DecayKind = option("decoupled", DECAY_KIND_HELP)

    def rule(self, role: str, lr_factor: float) -> Rule:
        return Rule(Sign(interpolated(*self.betas)), self.lr, self.weight_decay)


class Lion(ComposedOptimizer):
    """Lion. State: 4 bytes a parameter."""

    settings = LionConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        weight_decay_kind: DecayKind = "decoupled",
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
