"""Muon (Jordan et al. 2024) with the scale of Moonlight (Liu et al. 2025, arXiv 2502.16982).

m <- beta m + g;  p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(g + beta m)
"""

from collections.abc import Callable, Iterable

import torch


def newton_schulz(m: torch.Tensor) -> torch.Tensor:
    """A matrix (rows, columns) U S V^T with singular values S brought near 1, in bfloat16 on a GPU."""
    x = m.bfloat16() if m.is_cuda else m.float()
    x = x.T if m.size(0) > m.size(1) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if m.size(0) > m.size(1) else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices; filters count as matrices (out, rest). Train all other parameters by AdamW."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            beta, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, s = p.grad, self.state[p]
                if not s:
                    s["m"] = torch.zeros_like(p)

                m = s["m"].mul_(beta).add_(g)
                direction = (g + beta * m if group["nesterov"] else m).flatten(1)
                update = newton_schulz(direction).view_as(p)
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * 0.2 * max(direction.shape) ** 0.5)
        return loss
