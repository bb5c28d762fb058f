"""Shampoo in the form that the MARS paper builds on (arXiv 2411.10438, section 3.2.3): without accumulated
preconditioners, its update of a matrix is the orthogonal factor of the momentum. It is MARS-Shampoo without correction
and clipping, so comparing the two isolates the correction.

m <- beta m + g;  m = U S V^T;  p <- p - lr (wd p + sqrt(max(1, rows/columns)) U V^T), U V^T by Newton-Schulz
"""

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Adaptive, summed
from .newton_schulz import COEFFICIENTS_HELP, Coefficients, NSDtype, Orthogonal, coefficient_errors
from .options import option
from .settings import DECAY_KIND_HELP, DecayKind, Rule, Settings
from .signatures import arguments


@dataclass(frozen=True)
class ShampooConfig(Settings):
    """Shampoo on matrices, AdamW on the rest; only matrices are decayed. Defaults: those of MARS-Shampoo."""

    lr: float = option(2e-2, "peak learning rate of matrices", least=0)
    beta: float = option(0.95, "decay of the momentum", least=0, below=1)
    eps: float = option(1e-8, "added to the norm of the momentum, and by AdamW to sqrt(v_hat)", above=0)
    weight_decay: float = option(0.01, "weight decay; the trainer decays only matrices", least=0)
    adamw_lr: float = option(3e-3, "peak learning rate of embeddings and vectors", least=0)
    adamw_betas: tuple[float, float] = option((0.9, 0.95), "AdamW: decay of both moments", least=0, below=1)
    ns_dtype: NSDtype = option("auto", "dtype of Newton-Schulz; auto: bfloat16 on a GPU, float32 on a CPU")
    coefficients: Coefficients = option("quintic", COEFFICIENTS_HELP)
    weight_decay_kind: DecayKind = option("decoupled", DECAY_KIND_HELP)

    def rule(self, role: str, lr_factor: float) -> Rule:
        if role != "matrix":
            lr = self.adamw_lr * lr_factor if lr_factor else self.lr
            return Rule(Adaptive(self.adamw_betas, self.eps), lr, self.weight_decay)
        direction = Orthogonal(
            summed(self.beta), "original", self.eps, ns_dtype=self.ns_dtype, coefficients=self.coefficients
        )
        return Rule(direction, self.lr, self.weight_decay)

    def errors(self) -> list[str]:
        """Everything wrong with these settings, one line each."""
        return super().errors() or coefficient_errors(self.coefficients)


class Shampoo(ComposedOptimizer):
    """Shampoo. State: 4 bytes a matrix parameter, divided over the ranks of process_group, and 8 elsewhere."""

    settings = ShampooConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        *,
        beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        ns_dtype: NSDtype = "auto",
        coefficients: Coefficients = "quintic",
        weight_decay_kind: DecayKind = "decoupled",
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
