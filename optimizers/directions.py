"""The three directions as pure rules: they update their own averages and the weight, and decide nothing.

Every number that may change during a run enters as a 0-d tensor, so that a compiled rule is compiled
once, and the host never waits for the device. `Numbers` are neutral for a step that is to be skipped:
averages keep their values and the weight is multiplied by 1 and moved by 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Momentum:
    """Two mixes of the old momentum and the gradient: what is stored, and what gives the direction."""

    keep: tuple[float, float]  # momentum' = keep[0] momentum + keep[1] gradient
    use: tuple[float, float]  # direction of use[0] momentum + use[1] gradient, with the old momentum


def summed(beta: float, nesterov: bool = False) -> Momentum:
    """m' = beta m + g; direction of m', or with Nesterov of g + beta m' (Muon)."""
    return Momentum((beta, 1.0), (beta * beta, 1 + beta) if nesterov else (beta, 1.0))


def averaged(beta: float) -> Momentum:
    """m' = beta m + (1 - beta) g; direction of m' (MARS, MARS-M)."""
    return Momentum((beta, 1 - beta), (beta, 1 - beta))


def mixed(beta: float, gamma: float) -> Momentum:
    """n' = beta n + (1 - beta)(1 - gamma) g; direction of n' + gamma g.

    Equals `averaged` on the corrected, unclipped gradient at constant gamma, previous gradient zero at
    the first step, without keeping a previous gradient: with m the momentum there, n = m - gamma g.
    """
    inflow = (1 - beta) * (1 - gamma)
    return Momentum((beta, inflow), (beta, inflow + gamma))


def interpolated(beta1: float, beta2: float) -> Momentum:
    """m' = beta2 m + (1 - beta2) g; direction of beta1 m + (1 - beta1) g (Lion)."""
    return Momentum((beta2, 1 - beta2), (beta1, 1 - beta1))


class AdaptiveNumbers(NamedTuple):
    """Scalars of `adaptive`; the weight is divided by `root` sqrt(v) + `floor`, see there."""

    decay: Tensor
    inflow1: Tensor
    inflow2: Tensor
    root: Tensor
    floor: Tensor


class MomentumNumbers(NamedTuple):
    """Scalars of `mix` and of the update that follows."""

    decay: Tensor
    rate: Tensor
    keep_momentum: Tensor
    keep_gradient: Tensor
    use_momentum: Tensor
    use_gradient: Tensor


def adaptive_numbers(
    ok: Tensor, step: Tensor, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, eps_first: bool
) -> AdaptiveNumbers:
    """Scalars of an Adam step, float64. ok (0-d bool): whether to take it; step (0-d): its number, from 1.

    lr m_hat / (sqrt(v_hat) + eps) = m / (root sqrt(v) + floor) with root = bc1 / (lr sqrt(bc2)) and
    floor = eps bc1 / lr, or eps root if eps is added before v's bias correction.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    on = ok.to(step.dtype)
    root = correction1 / correction2.sqrt() / (lr or 1.0)
    floor = eps * root if eps_first else eps * correction1 / (lr or 1.0)
    return AdaptiveNumbers(
        decay=1 - on * (lr * weight_decay),
        inflow1=on * (1 - beta1),
        inflow2=on * (1 - beta2),
        root=root,
        # where nothing is to move, the weight is moved by m / inf
        floor=torch.where(ok, floor, torch.inf) if lr else torch.full_like(floor, torch.inf),
    )


def momentum_numbers(ok: Tensor, like: Tensor, lr: float, weight_decay: float, momentum: Momentum) -> MomentumNumbers:
    """Scalars of a momentum step in the dtype and on the device of `like`; ok as in `adaptive_numbers`."""
    on = ok.to(like.dtype)
    return MomentumNumbers(
        decay=1 - on * (lr * weight_decay),
        rate=on * lr,
        keep_momentum=1 - on * (1 - momentum.keep[0]),
        keep_gradient=on * momentum.keep[1],
        use_momentum=on * momentum.use[0],
        use_gradient=on * momentum.use[1],
    )


def adaptive(
    p: Tensor, c: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, n: AdaptiveNumbers, scratch: Tensor | None = None
) -> None:
    """Adam (Kingma and Ba 2015) with decoupled decay: p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps).

    p, c, m, v of one shape; p, m and v are updated in place and c is used up. v_max: the running maximum of v
    (AMSGrad). scratch: memory to work in.
    """
    m.lerp_(c, n.inflow1)
    v.lerp_(torch.mul(c, c, out=c), n.inflow2)  # c is not needed any more
    root = torch.sqrt(v if v_max is None else torch.maximum(v_max, v, out=v_max), out=scratch)
    p.mul_(n.decay).addcdiv_(m, root.mul_(n.root).add_(n.floor), value=-1)


def adaptive_kernel(
    ok: Tensor, step: Tensor, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]:
    """`adaptive` as one pass of the kernel behind torch's fused AdamW, for contiguous p, c, m, v, v_max on a CPU.

    ok and step as in `adaptive_numbers`. For eager mode, where `adaptive` makes eight passes.
    """
    numbers = dict(lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, maximize=False)
    count, skip = step.float(), 1 - ok.float()

    def kernel(p: Tensor, c: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None) -> None:
        largest = dict(amsgrad=v_max is not None, found_inf=skip)
        torch._fused_adamw_([p], [c], [m], [v], [v_max] if v_max is not None else [], [count], **numbers, **largest)

    return kernel


def mix(c: Tensor, m: Tensor, n: MomentumNumbers, out: Tensor) -> Tensor:
    """Update momentum m in place with gradient c; fills and returns `out`, which gives the direction. One shape."""
    torch.mul(m, n.use_momentum, out=out).addcmul_(c, n.use_gradient)
    m.mul_(n.keep_momentum).addcmul_(c, n.keep_gradient)
    return out


def signed(p: Tensor, c: Tensor, m: Tensor, n: MomentumNumbers) -> None:
    """Lion's direction (Chen et al. 2023): p <- (1 - lr wd) p - lr sign(used)."""
    p.mul_(n.decay).addcmul_(mix(c, m, n, out=torch.empty_like(c)).sign_(), n.rate, value=-1)


def orthogonal_scale(kind: str, rows: int, columns: int) -> float:
    """Factor on the learning rate of an orthogonalized matrix (rows, columns).

    "original": sqrt(max(1, rows/columns)) (K. Jordan); "moonlight": 0.2 sqrt(max(rows, columns)), the
    root mean square of an Adam update (Liu et al. 2025, arXiv 2502.16982).
    """
    if kind == "original":
        return max(1.0, rows / columns) ** 0.5
    assert kind == "moonlight"
    return 0.2 * max(rows, columns) ** 0.5
