"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the slowly rotating eigenbasis of Shampoo's preconditioners.

m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) (Q_L^T g Q_R)^2
p <- (1 - lr wd) p - lr Q_L (Q_L^T m_hat Q_R / (sqrt(v_hat) + eps)) Q_R^T
L <- beta2 L + (1 - beta2) g g^T;  R <- beta2 R + (1 - beta2) g^T g;  every few steps Q_L <- QR(L Q_L), Q_R <- QR(R Q_R)

As in the authors' code, the first gradient only sets L, R and their eigenvectors. Other tensors get AdamW.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimizers.composed import ComposedOptimizer
from optimizers.directions import Adaptive, MatrixDirection, State, Step
from optimizers.matrices import as_wide_matrices
from optimizers.norms import norm_of
from optimizers.options import option
from optimizers.settings import Rule, Settings

LARGEST_NORM = 1e15  # larger gradients are scaled to this norm, so that their squares and products stay finite


@dataclass(frozen=True)
class Rotated(MatrixDirection):
    """The direction of SOAP."""

    betas: tuple[float, float]
    eps: float
    refresh_every: int
    label = "adaptive in Shampoo's eigenbasis"
    state_names = ()

    def state(self, p: Tensor, blocks: int = 1) -> State:
        """The averages (blocks, m, n), the preconditioners and their bases (blocks, m, m) and (blocks, n, n)."""
        wide = as_wide_matrices(p.detach(), blocks)
        out = {key: wide.new_zeros(wide.shape) for key in ("exp_avg", "exp_avg_sq")} | {"count": wide.new_zeros(())}
        for side, size in (("left", wide.size(1)), ("right", wide.size(2))):
            out[side] = wide.new_zeros(blocks, size, size)
            out[f"{side}_basis"] = torch.eye(size, dtype=p.dtype, device=p.device).repeat(blocks, 1, 1)
        return out

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        each = stack.split(len(stack) // len(states))
        return torch.cat([self.direction(g, s, step) for g, s in zip(each, states, strict=True)])

    def direction(self, g: Tensor, s: State, step: Step) -> Tensor:
        """The direction of one parameter from its gradient g (blocks, m, n)."""
        (beta1, beta2), take = self.betas, step.take.to(g.dtype)
        s["count"].add_(take)
        g = g * (LARGEST_NORM / norm_of(g)).clamp(max=1).to(g.dtype)
        update = torch.zeros_like(g)
        if step.index > 1:
            rotated = s["left_basis"].mT @ g @ s["right_basis"]
            s["exp_avg"].lerp_(g, take * (1 - beta1))
            s["exp_avg_sq"].lerp_(rotated.square(), take * (1 - beta2))
            count = (s["count"].double() - 1).clamp(min=1)
            m = s["left_basis"].mT @ s["exp_avg"] @ s["right_basis"] / (1 - beta1**count).to(g.dtype)
            v = s["exp_avg_sq"] / (1 - beta2**count).to(g.dtype)
            update = s["left_basis"] @ (m / (v.sqrt() + self.eps)) @ s["right_basis"].mT
        for side, square in (("left", g @ g.mT), ("right", g.mT @ g)):
            s[side].lerp_(square, take * (1 - beta2))
            if step.index == 1:  # in float64: in float32 the solver can fail where many inputs are always zero
                s[f"{side}_basis"].copy_(torch.linalg.eigh(s[side].double()).eigenvectors)
            elif step.index % self.refresh_every == 0:
                refreshed = torch.linalg.qr(s[side] @ s[f"{side}_basis"]).Q
                s[f"{side}_basis"].copy_(torch.where(take > 0, refreshed, s[f"{side}_basis"]))
        return update

    def cost(self, rows: int, columns: int) -> float:
        return float(rows**3 + columns**3)


@dataclass(frozen=True)
class SOAPConfig(Settings):
    """SOAP on matrices, AdamW on the rest; only matrices are decayed. Defaults: the authors' code."""

    lr: float = option(3e-3, "peak learning rate", least=0)
    betas: tuple[float, float] = option(
        (0.95, 0.95), "decay of momentum; of square and preconditioners", least=0, below=1
    )
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    refresh_every: int = option(10, "steps between refreshes of the eigenbasis", least=1)
    weight_decay: float = option(0.01, "weight decay of matrices", least=0)

    def rule(self, role: str, lr_factor: float) -> Rule:
        matrix = Rotated(self.betas, self.eps, self.refresh_every)
        return Rule(matrix if role == "matrix" else Adaptive(self.betas, self.eps), self.lr, self.weight_decay)


class SOAP(ComposedOptimizer):
    """SOAP. State of a matrix (m, n): 2 m n + 2 m^2 + 2 n^2 numbers, divided over the ranks; 8 bytes elsewhere.

    The first step must not be skipped, because it sets the bases. A GradScaler skips first steps if its scale is high.
    """

    settings = SOAPConfig
