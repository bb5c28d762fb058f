"""MARS (Yuan et al. 2024, arXiv 2411.10438): the corrected gradient times one of three directions.

c = g + gamma beta1/(1-beta1) (g - previous), clipped to unit norm per tensor
mars-adamw    m, v averages of c, c^2;   p <- p - lr (wd p + m_hat / (sqrt(v_hat) + eps))
mars-lion     m average of c;            p <- p - lr (wd p + sign(m))
mars-shampoo  m average of c;            p <- p - lr (wd p + sqrt(max(1, rows/columns)) NewtonSchulz(m))
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from optimizers.composed import ComposedOptimizer
from optimizers.directions import averaged, summed
from optimizers.newton_schulz import NS_DTYPES
from optimizers.roles import Claim, grouped
from optimizers.rules import Rule, choice_faults, fraction_faults, number_faults

TYPES = ("mars-adamw", "mars-lion", "mars-shampoo")


def mars_faults(group: dict[str, Any]) -> list[str]:
    """What is wrong with the hyperparameters of MARS, a line each."""
    numbers = {k: group[k] for k in ("lr", "eps", "weight_decay", "gamma", "lr_1d", "weight_decay_1d")}
    out = number_faults(**numbers) + fraction_faults(betas=group["betas"], betas_1d=group["betas_1d"])
    return out + choice_faults(mars_type=(group["mars_type"], TYPES), ns_dtype=(group["ns_dtype"], NS_DTYPES))


class MARS(ComposedOptimizer):
    """MARS, a drop-in for the official class. State: 12 bytes a parameter for mars-adamw (16 with amsgrad), 8 for
    mars-lion and the matrices of mars-shampoo, 4 more in the exact form, 8 where AdamW is used.

    params: parameters or groups; a parameter of exactly two dimensions is corrected, the others get AdamW
    with betas_1d, weight_decay_1d and the rate lr lr_1d / (lr at construction), unless optimize_1d gives
    them the MARS rule at the group's own numbers. A group's "role" overrides the count of dimensions;
    "embedding" is corrected too, but never orthogonalized. At construction with lr = 0, lr_1d has no effect.
    clip_c: scale the corrected gradient of each tensor to at most unit norm, as the official code does.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        gamma: float = 0.025,
        is_approx: bool = True,
        mars_type: str = "mars-adamw",
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        clip_c: bool = True,
        ns_dtype: str = "auto",
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, gamma=gamma)
        defaults |= dict(is_approx=is_approx, mars_type=mars_type, clip_c=clip_c, ns_dtype=ns_dtype)
        defaults |= dict(optimize_1d=optimize_1d, lr_1d=lr_1d, betas_1d=betas_1d, weight_decay_1d=weight_decay_1d)
        super().__init__(params, defaults, process_group=process_group, compiled=compiled)

    def role_of(self, p: Tensor) -> str:
        return "matrix" if p.dim() == 2 else "vector"

    def faults(self, group: dict[str, Any]) -> list[str]:
        return mars_faults(group)

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        shared = dict(eps=group["eps"], amsgrad=group["amsgrad"])
        if role == "vector" and not group["optimize_1d"]:
            constructed = group.get("constructed_lr", group["lr"])
            ratio = group["lr_1d"] / constructed if constructed else 1.0
            return Rule("adaptive", group["lr"] * ratio, group["weight_decay_1d"], betas=group["betas_1d"], **shared)
        beta1 = group["betas"][0]
        corrected = dict(lr=group["lr"], weight_decay=group["weight_decay"], correction=(group["gamma"], beta1))
        corrected |= dict(clip=group["clip_c"])
        if group["mars_type"] == "mars-lion":
            return Rule("sign", **corrected, momentum=averaged(beta1))
        if group["mars_type"] == "mars-shampoo" and role == "matrix":
            # the official code divides the average by 1 - beta1 before Newton-Schulz: it is a sum
            momentum = dict(momentum=summed(beta1), scale="original", eps=group["eps"], ns_dtype=group["ns_dtype"])
            return Rule("orthogonal", **corrected, **momentum)
        return Rule("adaptive", **corrected, betas=group["betas"], **shared)


@dataclass(frozen=True)
class MARSConfig:
    """MARS on matrices and embeddings, AdamW on vectors; only matrices are decayed."""

    lr: float = 6e-3  # peak learning rate
    betas: tuple[float, float] = (0.95, 0.99)  # decay of the first and second moment; the first is in the correction
    eps: float = 1e-8  # added to sqrt(v_hat); mars-shampoo: to the norm, too
    weight_decay: float = 0.01  # of matrices
    gamma: float = 0.025  # strength of the correction
    gamma_end: float | None = None  # gamma moves there linearly over the run; none: it stays
    clip_c: bool = True  # clip the corrected gradient of each tensor to unit norm
    is_approx: bool = True  # false: exact correction, a second gradient per step
    mars_type: str = "mars-adamw"  # "mars-adamw", "mars-lion" or "mars-shampoo"
    optimize_1d: bool = False  # apply MARS to vectors too
    lr_1d: float = 3e-3  # peak learning rate of vectors
    betas_1d: tuple[float, float] = (0.9, 0.95)  # of vectors
    weight_decay_1d: float = 0.0  # of vectors; 0.1 as published
    amsgrad: bool = False  # divide by the largest second moment so far
    ns_dtype: str = "auto"  # mars-shampoo: "auto" (bfloat16 on a GPU, float32 on a CPU), "bfloat16" or "float32"

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        return mars_faults(vars(self)) + number_faults(gamma_end=self.gamma_end or 0.0)

    def build(self, claims: list[Claim], group: ProcessGroup | None = None, compiled: bool = False) -> MARS:
        """MARS over the claimed parameters."""
        arguments = {k: v for k, v in vars(self).items() if k not in ("weight_decay", "gamma_end")}
        groups = grouped(claims, weight_decay={"matrix": self.weight_decay, "embedding": 0.0, "vector": 0.0})
        return MARS(groups, **arguments, process_group=group, compiled=compiled)
