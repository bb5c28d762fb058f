"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the slowly rotating eigenbasis of Shampoo's preconditioners.

m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) (Q_L^T g Q_R)^2
p <- (1 - lr wd) (p - lr Q_L (Q_L^T m_hat Q_R / (sqrt(v_hat) + eps / sqrt(1 - beta2^t))) Q_R^T)
L <- beta2 L + (1 - beta2) g g^T;  R <- beta2 R + (1 - beta2) g^T g
every few steps: Q_L <- QR(L Q_L), Q_R <- QR(R Q_R), columns and v sorted by the eigenvalues that Q^T L Q estimates

A matrix is updated as by the authors' code, step by step: the first gradient only sets L, R and their eigenvectors,
and t counts the steps after it. What differs, on purpose:
- Embeddings and vectors get AdamW. The authors treat embeddings as matrices, and vectors by Adam with decay.
- Filters are flattened to (out, rest). The authors keep a basis for each of their four sides.
- The first eigenvectors are computed in float64, because the solver can fail in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .composed import ComposedOptimizer
from .directions import Adaptive, MatrixDirection, MatrixNumbers, State, Step
from .matrices import matrix_shape
from .options import option
from .settings import Rule, Settings
from .signatures import arguments

SIDES = ("left", "right")


@dataclass(frozen=True)
class Rotated(MatrixDirection):
    """The direction of SOAP."""

    betas: tuple[float, float]
    eps: float
    refresh_every: int
    largest_side: int
    label = "rotated adaptive"
    counts_steps = True
    state_names = ()

    def owner_state(self, p: Tensor, blocks: int) -> State:
        """The averages (blocks, m, n) in the bases, the preconditioners and bases (blocks, m, m) and (blocks, n, n).

        A side above `largest_side` has neither.
        """
        shape = sorted(matrix_shape(p, blocks))
        out = {key: p.new_zeros(blocks, *shape) for key in ("exp_avg", "exp_avg_sq")}
        for side, size in zip(SIDES, shape, strict=True):
            if size <= self.largest_side:
                out[side] = p.new_zeros(blocks, size, size)
                out[f"{side}_basis"] = torch.eye(size, dtype=p.dtype, device=p.device).repeat(blocks, 1, 1)
        return out

    def numbers(self, step: Step) -> MatrixNumbers:
        return MatrixNumbers(step.decay if step.count > 1 else 1.0, step.lr)

    def directions(self, stack: Tensor, states: list[State], step: Step) -> Tensor:
        of_blocks = [
            {key: t[block] for key, t in s.items() if t.dim()}
            for s in states
            for block in range(len(stack) // len(states))
        ]
        return torch.stack([self.direction(g, s, step) for g, s in zip(stack, of_blocks, strict=True)])

    def direction(self, g: Tensor, s: State, step: Step) -> Tensor:
        """The direction of one matrix from its gradient g (m, n)."""
        (beta1, beta2), count = self.betas, step.count - 1  # without the first step
        update = torch.zeros_like(g)
        if count:
            rotated = _to_bases(g, s)
            s["exp_avg"].lerp_(rotated, 1 - beta1)
            s["exp_avg_sq"].lerp_(rotated.square(), 1 - beta2)
            factor = (1 - beta2**count) ** 0.5 / (1 - beta1**count) * step.decay
            update = _from_bases(s["exp_avg"] / (s["exp_avg_sq"].sqrt() + self.eps), s) * factor
        for side, x in zip(SIDES, (g, g.T), strict=True):
            if side in s:
                s[side].lerp_(x @ x.T, 1 - beta2)
                if not count:  # in float64: in float32 the solver can fail where many inputs are always zero
                    s[f"{side}_basis"].copy_(torch.linalg.eigh(s[side].double()).eigenvectors.flip(1))
        if count and count % self.refresh_every == 0:
            self.refresh(s)
        return update

    def refresh(self, s: State) -> None:
        """One power iteration on each basis, sorted by eigenvalue, and the averages brought to the new bases."""
        average = _from_bases(s["exp_avg"], s)
        for dim, side in enumerate(SIDES):
            if side in s:
                basis = s[f"{side}_basis"]
                order = (basis.T @ s[side] @ basis).diagonal().argsort(descending=True)
                s["exp_avg_sq"].copy_(s["exp_avg_sq"].index_select(dim, order))
                basis.copy_(torch.linalg.qr(s[side] @ basis[:, order]).Q)
        s["exp_avg"].copy_(_to_bases(average, s))

    def cost(self, rows: int, columns: int) -> float:
        return float(rows * columns + sum(side**3 for side in (rows, columns) if side <= self.largest_side))


def _to_bases(x: Tensor, s: State) -> Tensor:
    """Q_L^T x Q_R; a side without a basis stays as it is."""
    x = s["left_basis"].T @ x if "left_basis" in s else x
    return x @ s["right_basis"] if "right_basis" in s else x


def _from_bases(x: Tensor, s: State) -> Tensor:
    """Q_L x Q_R^T."""
    x = s["left_basis"] @ x if "left_basis" in s else x
    return x @ s["right_basis"].T if "right_basis" in s else x


@dataclass(frozen=True)
class SOAPConfig(Settings):
    """SOAP on matrices, AdamW on the rest; only matrices are decayed. Defaults: the authors' code."""

    lr: float = option(3e-3, "peak learning rate", least=0)
    betas: tuple[float, float] = option(
        (0.95, 0.95), "decay of momentum; of square and preconditioners", least=0, below=1
    )
    eps: float = option(1e-8, "added to sqrt(v_hat)", above=0)
    refresh_every: int = option(10, "steps between refreshes of the eigenbasis", least=1)
    largest_side: int = option(10_000, "a longer side of a matrix is not rotated", least=1)
    weight_decay: float = option(0.01, "weight decay; the trainer decays only matrices", least=0)

    def rule(self, role: str, lr_factor: float) -> Rule:
        matrix = Rotated(self.betas, self.eps, self.refresh_every, self.largest_side)
        return Rule(matrix if role == "matrix" else Adaptive(self.betas, self.eps), self.lr, self.weight_decay)


class SOAP(ComposedOptimizer):
    """SOAP. State of a matrix (m, n): 2 m n + 2 m^2 + 2 n^2 numbers, divided over the ranks; 8 bytes elsewhere."""

    settings = SOAPConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        refresh_every: int = 10,
        largest_side: int = 10_000,
        weight_decay: float = 0.01,
        process_group: ProcessGroup | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
