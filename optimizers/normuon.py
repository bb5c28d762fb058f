"""NorMuon (Li et al. 2025, arXiv 2510.05491): Muon whose neurons are normalized by their mean square over time.

O = NewtonSchulz(momentum);  v <- beta2 v + (1 - beta2) mean over each row of O^2;  O' = O / (sqrt(v) + eps)
p <- (1 - lr wd) p - lr 0.2 sqrt(rows columns) O' / |O'|_F
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import State, Step, summed
from .matrices import matrix_shape
from .muon import MuonConfig
from .newton_schulz import Coefficients, NSDtype, Orthogonal, Scale
from .options import option
from .settings import DecayKind, Rule
from .signatures import arguments

EPS = 1e-10


@dataclass(frozen=True)
class NormalizedOrthogonal(Orthogonal):
    """The direction of NorMuon. A matrix (rows, columns) has one neuron a row."""

    beta2: float = 0.95
    label = "row-normalized orthogonal"

    def owner_state(self, p: Tensor, blocks: int) -> State:
        """The rows' mean squares, in the layout of wide matrices: a tall matrix has its rows in columns."""
        rows, columns = matrix_shape(p, blocks)
        return {"row_sq": p.new_zeros((blocks, 1, rows) if rows > columns else (blocks, rows, 1))}

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        found = super().directions(stack, states, step)
        normalized = []
        for matrix, state in zip(found.split(len(stack) // len(states)), states, strict=True):
            v = state["row_sq"]
            mean = matrix.to(v.dtype).square().mean(2 if v.size(2) == 1 else 1, keepdim=True)
            v.lerp_(mean, 1 - self.beta2)
            scaled = matrix / (v.sqrt() + EPS)
            normalized.append(scaled / torch.linalg.matrix_norm(scaled, keepdim=True).clamp(min=EPS))
        return torch.cat(normalized).to(found.dtype)

    def scale(self, rows: int, columns: int) -> float:
        return 0.2 * (rows * columns) ** 0.5


@dataclass(frozen=True)
class NorMuonConfig(MuonConfig):
    """NorMuon on matrices; `scale` has no effect, since the root mean square of every update is 0.2 lr."""

    beta2: float = option(0.95, "decay of the rows' mean squares", least=0, below=1)

    def rule(self, role: str, lr_factor: float) -> Rule:
        if role != "matrix":
            return self.adamw()
        plain = self.orthogonal(summed(self.momentum, self.nesterov))
        return Rule(NormalizedOrthogonal(**vars(plain), beta2=self.beta2), self.lr, self.weight_decay)


class NorMuon(ComposedOptimizer):
    """NorMuon. State: 4 bytes a matrix parameter and 4 a row, divided over the ranks, and 8 elsewhere."""

    settings = NorMuonConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        scale: Scale = "moonlight",
        ns_steps: int = 5,
        ns_dtype: NSDtype = "auto",
        coefficients: Coefficients = "quintic",
        weight_decay_kind: DecayKind = "decoupled",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_eps_first: bool = False,
        nesterov: bool = True,
        beta2: float = 0.95,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
