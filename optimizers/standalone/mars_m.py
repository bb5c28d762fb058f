"""MARS-M (Liu et al. 2025, arXiv 2510.21800): the momentum of a variance-reduced gradient, orthogonalized.

c = g + gamma beta / (1 - beta) (g - g_last), scaled to at most unit norm per matrix; g_last is 0 at the first step
m <- beta m + (1 - beta) c;  p <- (1 - lr wd) p - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(m)
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


class MARSM(torch.optim.Optimizer):
    """MARS-M for weight matrices; filters count as matrices (out, rest). Train all other parameters by AdamW."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 6e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        gamma: float = 0.025,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, gamma=gamma))

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
                    s |= {key: torch.zeros_like(p) for key in ("m", "last")}

                c = g + group["gamma"] * beta / (1 - beta) * (g - s["last"])
                c = c / c.norm().clamp(min=1)
                s["last"].copy_(g)

                m = s["m"].lerp_(c, 1 - beta).flatten(1)
                update = newton_schulz(m).view_as(p)
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * 0.2 * max(m.shape) ** 0.5)
        return loss
