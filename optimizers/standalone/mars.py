"""MARS-AdamW (Yuan et al. 2024, arXiv 2411.10438): AdamW on a variance-reduced gradient.

c = g + gamma beta1 / (1 - beta1) (g - g_last), scaled to at most unit norm per tensor; g_last is 0 at the first step
m <- beta1 m + (1 - beta1) c;  v <- beta2 v + (1 - beta2) c^2
p <- (1 - lr wd) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
"""

from collections.abc import Callable, Iterable

import torch


class MARS(torch.optim.Optimizer):
    """MARS-AdamW for weight matrices and embeddings; the paper trains gains and biases by AdamW."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, gamma=gamma))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, s = p.grad, self.state[p]
                if not s:
                    s["step"] = torch.zeros(())
                    s |= {key: torch.zeros_like(p) for key in ("m", "v", "last")}
                s["step"] += 1
                t = int(s["step"])

                c = g + group["gamma"] * beta1 / (1 - beta1) * (g - s["last"])
                c = c / c.norm().clamp(min=1)
                s["last"].copy_(g)

                s["m"].lerp_(c, 1 - beta1)
                s["v"].lerp_(c * c, 1 - beta2)
                denominator = (s["v"] / (1 - beta2**t)).sqrt() + group["eps"]
                update = s["m"] / (1 - beta1**t) / denominator
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
        return loss
