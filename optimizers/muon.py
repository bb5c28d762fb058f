"""Muon (Jordan et al. 2024; Moonlight: Liu et al. 2025, arXiv 2502.16982): the raw gradient times the
orthogonal direction on matrices, AdamW on the rest.

    m <- mu m + g;  O = NewtonSchulz(g + mu m, or m without Nesterov);  p <- (1 - lr wd) p - lr s O
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from optimizers.composed import ComposedOptimizer
from optimizers.directions import summed
from optimizers.newton_schulz import NS_DTYPES
from optimizers.roles import Claim, grouped
from optimizers.rules import Rule, choice_faults, count_faults, fraction_faults, number_faults

SCALES = ("moonlight", "original")


def adamw_rule(group: dict[str, Any]) -> Rule:
    """AdamW on what is no matrix, beside Muon and MARS-M."""
    return Rule(
        "adaptive",
        group["lr"],
        group["weight_decay"],
        betas=group["adamw_betas"],
        eps=group["adamw_eps"],
        eps_first=group["adamw_eps_first"],
    )


def common_faults(group: dict[str, Any]) -> list[str]:
    """What Muon and MARS-M check alike."""
    numbers = {k: group[k] for k in ("lr", "weight_decay", "adamw_eps")}
    fractions = {k: group[k] for k in ("momentum", "adamw_betas")}
    out = number_faults(**numbers) + fraction_faults(**fractions)
    out += choice_faults(scale=(group["scale"], SCALES), ns_dtype=(group["ns_dtype"], NS_DTYPES))
    return out + count_faults(ns_steps=group["ns_steps"])


class Muon(ComposedOptimizer):
    """Muon. State: 4 bytes a matrix parameter, divided over the ranks of process_group, and 8 elsewhere.

    params: parameters or groups; a group's "role" ("matrix", "embedding", "vector") decides between Muon
    and AdamW, and without one the number of dimensions does. Put embeddings in a group of their own role.
    scale: "moonlight", 0.2 sqrt(max(rows, columns)), or "original", sqrt(max(1, rows/columns)).
    adamw_eps_first: add eps before the bias correction of v, as Moonlight's code does.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "moonlight",
        ns_steps: int = 5,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_eps_first: bool = True,
        ns_dtype: str = "auto",
        *,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, scale=scale)
        defaults |= dict(ns_steps=ns_steps, ns_dtype=ns_dtype)
        defaults |= dict(adamw_betas=adamw_betas, adamw_eps=adamw_eps, adamw_eps_first=adamw_eps_first)
        super().__init__(params, defaults, process_group=process_group, compiled=compiled)

    def faults(self, group: dict[str, Any]) -> list[str]:
        return common_faults(group)

    def rule(self, group: dict[str, Any], role: str) -> Rule:
        if role != "matrix":
            return adamw_rule(group)
        return Rule(
            "orthogonal",
            group["lr"],
            group["weight_decay"],
            momentum=summed(group["momentum"], group["nesterov"]),
            scale=group["scale"],
            eps=1e-7,
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
        )


@dataclass(frozen=True)
class OrthogonalConfig:
    """What Muon and MARS-M share: orthogonalized matrices; AdamW, by default without decay, on the rest."""

    lr: float = 6e-3  # peak learning rate of matrices
    adamw_lr: float | None = None  # peak learning rate of embeddings and vectors; none: lr
    weight_decay: float = 0.1  # of matrices
    adamw_weight_decay: float = 0.0  # of embeddings and vectors
    momentum: float = 0.95  # decay of the momentum
    scale: str = "moonlight"  # "moonlight": 0.2 sqrt(max(rows, columns)); "original": sqrt(max(1, rows/columns))
    ns_steps: int = 5  # Newton-Schulz iterations
    ns_dtype: str = "auto"  # "auto" (bfloat16 on a GPU, float32 on a CPU), "bfloat16" or "float32"
    split_qkv: bool = False  # orthogonalize query, key and value apart instead of as one matrix (as published)
    adamw_betas: tuple[float, float] = (0.9, 0.95)  # of AdamW: decay of the first and second moment
    adamw_eps: float = 1e-8  # of AdamW: added to sqrt(v_hat)
    adamw_eps_first: bool = False  # add eps before the bias correction of v (as published)

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        extra = number_faults(adamw_lr=self.adamw_lr or 0.0, adamw_weight_decay=self.adamw_weight_decay)
        return common_faults(vars(self)) + extra

    def groups(self, claims: list[Claim]) -> list[dict[str, Any]]:
        """Parameter groups with learning rate and decay by role, and fused QKV in three blocks if asked."""
        lr = self.lr if self.adamw_lr is None else self.adamw_lr
        decay = self.adamw_weight_decay
        return grouped(
            claims,
            lr={"matrix": self.lr, "embedding": lr, "vector": lr},
            weight_decay={"matrix": self.weight_decay, "embedding": decay, "vector": decay},
            blocks=lambda c: (
                3 if self.split_qkv and c.role == "matrix" and c.name.endswith("attn.c_attn.weight") else 1
            ),
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments that Muon and MARSM share."""
        keys = ("momentum", "scale", "ns_steps", "ns_dtype", "adamw_betas", "adamw_eps", "adamw_eps_first")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class MuonConfig(OrthogonalConfig):
    """Muon on matrices."""

    nesterov: bool = True  # orthogonalize g + momentum m instead of m
    embeddings_as_matrices: bool = False  # put embeddings under Muon too (as published for "original")

    def build(self, claims: list[Claim], group: ProcessGroup | None = None, compiled: bool = False) -> Muon:
        """Muon over the claimed parameters."""
        if self.embeddings_as_matrices:
            claims = [Claim(c.name, c.param, "matrix" if c.role == "embedding" else c.role) for c in claims]
        arguments = dict(nesterov=self.nesterov, process_group=group, compiled=compiled)
        return Muon(self.groups(claims), **self.arguments(), **arguments)
