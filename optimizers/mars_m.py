"""MARS-M (Liu et al. 2025, arXiv 2510.21800): the corrected gradient, orthogonalized, on matrices; AdamW on the rest.

c = g + gamma beta/(1-beta) (g - previous), clipped to unit norm per tensor
m <- beta m + (1 - beta) c;  p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(m)
"""

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import averaged, corrected_average
from .muon import OrthogonalConfig
from .newton_schulz import Coefficients, NSDtype, Scale
from .options import option
from .settings import DecayKind, Rule
from .signatures import arguments


@dataclass(frozen=True)
class MARSMConfig(OrthogonalConfig):
    """MARS-M on matrices."""

    gamma: float = option(0.025, "strength of the correction", least=0)
    clip_c: bool = option(True, "clip the corrected gradient of each tensor to unit norm; false: one buffer less")
    is_approx: bool = option(True, "false: exact correction, a second gradient per step")
    keep_previous: bool = option(False, "keep the previous gradient without clipping, too, so that gamma may change")

    def rule(self, role: str, lr_factor: float) -> Rule:
        if role != "matrix":
            return self.adamw()
        momentum = averaged(self.momentum)
        correction: tuple[float, float] | None = (self.gamma, self.momentum)
        if self.is_approx and not self.clip_c and not self.keep_previous:
            momentum, correction = corrected_average(self.momentum, self.gamma), None
        return Rule(self.orthogonal(momentum), self.lr, self.weight_decay, correction, self.clip_c)


class MARSM(ComposedOptimizer):
    """MARS-M. State: 8 bytes a matrix parameter (12 exact, 4 in the one-buffer form), divided over the ranks of
    process_group, and 8 elsewhere.

    A group's "role" decides between MARS-M ("matrix") and AdamW ("embedding", "vector"), and without one the number of
    dimensions does. Put embeddings in a group of their own role, as `param_groups(model)` does.
    Without clip_c the approximate form is Nesterov momentum with mixing weight gamma and keeps one buffer, unless
    keep_previous asks for both. The official runs clip, and their AdamW adds eps first.
    """

    settings = MARSMConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        gamma: float = 0.025,
        ns_steps: int = 5,
        clip_c: bool = True,
        is_approx: bool = True,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_eps_first: bool = True,
        scale: Scale = "moonlight",
        ns_dtype: NSDtype = "auto",
        keep_previous: bool = False,
        coefficients: Coefficients = "quintic",
        weight_decay_kind: DecayKind = "decoupled",
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
