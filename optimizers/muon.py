"""Muon (Jordan et al. 2024; Moonlight: Liu et al. 2025, arXiv 2502.16982): orthogonalized momentum on matrices,
AdamW on the rest.

m <- mu m + g;  O = NewtonSchulz(g + mu m, or m without Nesterov);  p <- (1 - lr wd) p - lr scale O
"""

from dataclasses import dataclass, replace
from typing import Any

from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Adaptive, Momentum, summed
from .newton_schulz import COEFFICIENTS_HELP, Coefficients, NSDtype, Orthogonal, Scale, coefficient_errors
from .options import option
from .roles import Assignment, grouped
from .settings import DECAY_KIND_HELP, DecayKind, Rule, Settings
from .signatures import arguments


@dataclass(frozen=True)
class OrthogonalConfig(Settings):
    """What Muon, NorMuon and MARS-M share: orthogonalized matrices; AdamW, by default without decay, on the rest."""

    lr: float = option(6e-3, "peak learning rate", least=0)
    adamw_lr: float | None = option(
        None, "peak learning rate of embeddings and vectors; none: lr", least=0, run_only=True
    )
    weight_decay: float = option(0.1, "weight decay; the trainer decays only matrices", least=0)
    adamw_weight_decay: float = option(0.0, "weight decay of embeddings and vectors", least=0, run_only=True)
    momentum: float = option(0.95, "decay of the momentum", least=0, below=1)
    scale: Scale = option(
        "moonlight", "factor on lr: moonlight 0.2 sqrt(max(rows, columns)); original sqrt(max(1, rows/columns))"
    )
    ns_steps: int = option(5, "Newton-Schulz iterations", least=1)
    ns_dtype: NSDtype = option("auto", "dtype of Newton-Schulz; auto: bfloat16 on a GPU, float32 on a CPU")
    coefficients: Coefficients = option("quintic", COEFFICIENTS_HELP)
    weight_decay_kind: DecayKind = option("decoupled", DECAY_KIND_HELP)
    split_qkv: bool = option(
        False, "orthogonalize query, key and value separately instead of as one matrix", run_only=True
    )
    split_heads: int = option(
        0, "number of heads: orthogonalize query, key and value head by head; 0: do not", least=0, run_only=True
    )
    adamw_betas: tuple[float, float] = option((0.9, 0.95), "AdamW: decay of both moments", least=0, below=1)
    adamw_eps: float = option(1e-8, "AdamW: added to sqrt(v_hat)", above=0)
    adamw_eps_first: bool = option(False, "AdamW: add eps before the bias correction of v (as published)")

    def adamw(self) -> Rule:
        """The AdamW rule for embeddings and vectors."""
        direction = Adaptive(self.adamw_betas, self.adamw_eps, eps_first=self.adamw_eps_first)
        return Rule(direction, self.lr, self.weight_decay)

    def orthogonal(self, momentum: Momentum) -> Orthogonal:
        """The direction of matrices."""
        return Orthogonal(
            momentum, self.scale, ns_steps=self.ns_steps, ns_dtype=self.ns_dtype, coefficients=self.coefficients
        )

    def errors(self) -> list[str]:
        """Everything wrong with these settings, one line each."""
        out = super().errors()
        if not out and self.split_qkv and self.split_heads:
            out.append(f"split_heads={self.split_heads}: splits query, key and value already; leave out split_qkv")
        return out or coefficient_errors(self.coefficients, self.ns_steps)

    def groups(self, assignments: list[Assignment]) -> list[dict[str, Any]]:
        """Parameter groups with learning rate and decay by role, and query, key and value in blocks if asked."""
        lr = self.lr if self.adamw_lr is None else self.adamw_lr
        decay = self.adamw_weight_decay

        def blocks(a: Assignment) -> int:
            if a.role != "matrix" or not a.name.endswith("attn.c_attn.weight"):
                return 1
            return 3 * self.split_heads or (3 if self.split_qkv else 1)  # rows: heads of query, of key, of value

        return grouped(
            assignments,
            lr={"matrix": self.lr, "embedding": lr, "vector": lr},
            weight_decay={"matrix": self.weight_decay, "embedding": decay, "vector": decay},
            blocks=blocks,
        )


@dataclass(frozen=True)
class MuonConfig(OrthogonalConfig):
    """Muon on matrices."""

    nesterov: bool = option(True, "orthogonalize g + momentum m instead of m")
    embeddings_as_matrices: bool = option(
        False, 'put embeddings under Muon, too (as published for scale "original")', run_only=True
    )

    def rule(self, role: str, lr_factor: float) -> Rule:
        if role != "matrix":
            return self.adamw()
        return Rule(self.orthogonal(summed(self.momentum, self.nesterov)), self.lr, self.weight_decay)

    def groups(self, assignments: list[Assignment]) -> list[dict[str, Any]]:
        if self.embeddings_as_matrices:
            assignments = [replace(a, role="matrix") if a.role == "embedding" else a for a in assignments]
        return super().groups(assignments)


class Muon(ComposedOptimizer):
    """Muon. State: 4 bytes a matrix parameter, divided over the ranks of process_group, and 8 elsewhere.

    A group's "role" ("matrix", "embedding", "vector") decides between Muon and AdamW, and without one the number of
    dimensions does. Put embeddings in a group of their own role, as `param_groups(model)` does.
    """

    settings = MuonConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        scale: Scale = "moonlight",
        ns_steps: int = 5,
        ns_dtype: NSDtype = "auto",
        coefficients: Coefficients = "quintic",
        weight_decay_kind: DecayKind = "decoupled",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_eps_first: bool = True,
        nesterov: bool = True,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
