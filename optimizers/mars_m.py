"""MARS-M (Liu et al. 2025, arXiv 2510.21800): the corrected gradient times the orthogonal direction on
matrices, AdamW on the rest.

    c = g + gamma beta/(1-beta) (g - previous), clipped to unit norm per tensor
    m <- beta m + (1 - beta) c;  p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(m)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from optimizers.composed import ComposedOptimizer
from optimizers.directions import averaged, mixed
from optimizers.muon import OrthogonalConfig, adamw_rule, common_faults
from optimizers.roles import Claim
from optimizers.rules import Rule, number_faults


class MARSM(ComposedOptimizer):
    """MARS-M. State: 8 bytes a matrix parameter (12 exact, 4 in the one-buffer form), divided over the ranks of
    process_group, and 8 elsewhere.

    params: parameters or groups; a group's "role" decides between MARS-M ("matrix") and AdamW ("embedding",
    "vector"), and without one the number of dimensions does. Put embeddings in a group of their own role.
    clip_c: scale the corrected gradient of each tensor to at most unit norm, as the official runs do.
    Without it the approximate form is Nesterov momentum with mixing weight gamma and keeps one buffer;
    keep_previous=True keeps both, which an unclipped run needs if gamma changes on the way.
    adamw_eps_first: add eps before the bias correction of v, as the official code does.
    """

    def __init__(
        self,
        params: Iterable,
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
        scale: str = "moonlight",
        ns_dtype: str = "auto",
        keep_previous: bool = False,
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, gamma=gamma, ns_steps=ns_steps)
        defaults |= dict(clip_c=clip_c, is_approx=is_approx, keep_previous=keep_previous, scale=scale)
        defaults |= dict(ns_dtype=ns_dtype)
        defaults |= dict(adamw_betas=adamw_betas, adamw_eps=adamw_eps, adamw_eps_first=adamw_eps_first)
        super().__init__(params, defaults, process_group=process_group, compiled=compiled)

    def faults(self, group: dict[str, Any]) -> list[str]:
        return common_faults(group) + number_faults(gamma=group["gamma"])

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        if role != "matrix":
            return adamw_rule(group)
        beta, gamma = group["momentum"], group["gamma"]
        one_buffer = group["is_approx"] and not group["clip_c"] and not group["keep_previous"]
        return Rule(
            "orthogonal",
            group["lr"],
            group["weight_decay"],
            correction=None if one_buffer else (gamma, beta),
            clip=group["clip_c"],
            momentum=mixed(beta, gamma) if one_buffer else averaged(beta),
            scale=group["scale"],
            eps=1e-7,
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
        )


@dataclass(frozen=True)
class MARSMConfig(OrthogonalConfig):
    """MARS-M on matrices."""

    gamma: float = 0.025  # strength of the correction
    gamma_end: float | None = None  # gamma moves there linearly over the run; none: it stays
    clip_c: bool = True  # clip the corrected gradient of each tensor to unit norm; false: one buffer instead of two
    is_approx: bool = True  # false: exact correction, a second gradient per step

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        return super().faults() + number_faults(gamma=self.gamma, gamma_end=self.gamma_end or 0.0)

    def build(self, claims: list[Claim], group: ProcessGroup | None = None, compiled: bool = False) -> MARSM:
        """MARS-M over the claimed parameters."""
        arguments = dict(gamma=self.gamma, clip_c=self.clip_c, is_approx=self.is_approx)
        arguments |= dict(keep_previous=self.gamma_end is not None, process_group=group, compiled=compiled)
        return MARSM(self.groups(claims), **self.arguments(), **arguments)
