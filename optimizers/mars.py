"""MARS (Yuan et al. 2024, arXiv 2411.10438): the corrected gradient by one of three rules.

c = g + gamma beta1/(1-beta1) (g - previous), clipped to unit norm per tensor
mars-adamw    m, v averages of c, c^2;   p <- p - lr (wd p + m_hat / (sqrt(v_hat) + eps))
              second_moment="raw": v averages g^2
mars-lion     m average of c;            p <- p - lr (wd p + sign(m))
mars-shampoo  m average of c;            p <- p - lr (wd p + sqrt(max(1, rows/columns)) NewtonSchulz(m))
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Adaptive, AdaptiveByRaw, Direction, Sign, averaged, summed
from .newton_schulz import COEFFICIENTS_HELP, Coefficients, NSDtype, Orthogonal, coefficient_errors
from .options import option
from .settings import DECAY_KIND_HELP, DecayKind, Rule, Settings
from .signatures import arguments

MARSType = Literal["mars-adamw", "mars-lion", "mars-shampoo"]
SecondMoment = Literal["corrected", "raw"]


@dataclass(frozen=True)
class MARSConfig(Settings):
    """MARS on matrices and embeddings, AdamW on vectors; only matrices are decayed."""

    lr: float = option(6e-3, "peak learning rate", least=0)
    betas: tuple[float, float] = option(
        (0.95, 0.99), "decay of the first and second moment; the correction uses the first", least=0, below=1
    )
    eps: float = option(1e-8, "added to sqrt(v_hat); mars-shampoo: to the norm, too", above=0)
    weight_decay: float = option(0.01, "weight decay; the trainer decays only matrices", least=0)
    gamma: float = option(0.025, "strength of the correction", least=0)
    clip_c: bool = option(True, "clip the corrected gradient of each tensor to unit norm")
    is_approx: bool = option(True, "false: exact correction, a second gradient per step")
    mars_type: MARSType = option("mars-adamw", "direction of matrices")
    optimize_1d: bool = option(False, "apply MARS to vectors, too")
    lr_1d: float = option(3e-3, "peak learning rate of vectors", least=0)
    betas_1d: tuple[float, float] = option((0.9, 0.95), "vectors: decay of both moments", least=0, below=1)
    weight_decay_1d: float = option(0.0, "weight decay of vectors; 0.1 as published", least=0)
    amsgrad: bool = option(False, "divide by the largest second moment so far")
    ns_dtype: NSDtype = option("auto", "dtype of Newton-Schulz; auto: bfloat16 on a GPU, float32 on a CPU")
    second_moment: SecondMoment = option(
        "corrected", "gradient whose square mars-adamw averages: corrected (as published), or raw and never clipped"
    )
    coefficients: Coefficients = option("quintic", COEFFICIENTS_HELP)
    weight_decay_kind: DecayKind = option("decoupled", DECAY_KIND_HELP)

    def rule(self, role: str, lr_factor: float) -> Rule:
        if role == "vector" and not self.optimize_1d:
            lr = self.lr_1d * lr_factor if lr_factor else self.lr
            return Rule(Adaptive(self.betas_1d, self.eps, self.amsgrad), lr, self.weight_decay_1d)
        correction = (self.gamma, self.betas[0])
        return Rule(self.direction(role), self.lr, self.weight_decay, correction, self.clip_c)

    def direction(self, role: str) -> Direction:
        """The direction of a parameter whose gradient is corrected."""
        if self.mars_type == "mars-lion":
            return Sign(averaged(self.betas[0]))
        if self.mars_type == "mars-shampoo" and role == "matrix":
            # the official code divides the average by 1 - beta1 before Newton-Schulz: it is a sum
            momentum = summed(self.betas[0])
            return Orthogonal(momentum, "original", self.eps, ns_dtype=self.ns_dtype, coefficients=self.coefficients)
        if self.second_moment == "raw":
            return AdaptiveByRaw(self.betas, self.eps)
        return Adaptive(self.betas, self.eps, self.amsgrad)

    def errors(self) -> list[str]:
        """Everything wrong with these settings, one line each."""
        out = super().errors()
        if self.second_moment == "raw" and (self.mars_type != "mars-adamw" or self.amsgrad or not self.is_approx):
            out.append("second_moment=raw: needs mars_type=mars-adamw, amsgrad=false and is_approx=true")
        if self.mars_type != "mars-shampoo" and self.coefficients != "quintic":
            out.append(f"coefficients={self.coefficients!r}: needs mars_type=mars-shampoo")
        return out or coefficient_errors(self.coefficients)


class MARS(ComposedOptimizer):
    """MARS, a drop-in for the official class. State: 12 bytes a parameter for mars-adamw (16 with amsgrad), 8 for
    mars-lion and the matrices of mars-shampoo, 4 more in the exact form, 8 where AdamW is used.

    A parameter of exactly two dimensions is corrected. The others get AdamW with betas_1d and weight_decay_1d. Their
    rate is the present lr of their group times lr_1d / lr, both as the constructor got them; a constructor's lr of 0
    leaves the group's lr. A group's own weight_decay does not reach them. optimize_1d gives them the MARS rule with the
    group's own numbers instead. A group's "role" overrides the number of dimensions; "embedding" is corrected, too, but
    never orthogonalized.
    The squares of raw gradients, with second_moment="raw", are not clipped (see remark 3.2 of the paper).
    """

    settings = MARSConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        gamma: float = 0.025,
        is_approx: bool = True,
        mars_type: MARSType = "mars-adamw",
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        clip_c: bool = True,
        ns_dtype: NSDtype = "auto",
        second_moment: SecondMoment = "corrected",
        coefficients: Coefficients = "quintic",
        weight_decay_kind: DecayKind = "decoupled",
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))

    def role_of(self, p: Tensor) -> str:
        """The role of a parameter whose group does not name a role, as in the official class: two dimensions, or AdamW.

        So convolution filters get AdamW with lr_1d, betas_1d and weight_decay_1d. Almost all weights of a ResNet are
        filters; to train them with MARS, put them in a group of the role "matrix", where they are flattened to
        (out, rest).
        """
        return "matrix" if p.dim() == 2 else "vector"
