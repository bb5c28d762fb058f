"""Speed on a CPU: work block by block, so that a parameter's tensors stay in a core's cache, and Adam as one kernel.

The rules do not know of it. On a GPU and in compiled code these functions change nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .directions import Adaptive, Direction, Step

BLOCK = 1 << 16  # elements: five such float32 blocks stay in a core's cache


def blocks(*tensors: Tensor | None) -> list[tuple]:
    """Tensors of one shape as tuples of blocks (n,); whole elsewhere, and where one is not contiguous."""
    given = [t for t in tensors if t is not None]
    if not _is_cut(given[0]) or not all(t.is_contiguous() for t in given):
        return [tensors]
    count = -(-given[0].numel() // BLOCK)
    columns = [[None] * count if t is None else t.view(-1).split(BLOCK) for t in tensors]
    return list(zip(*columns, strict=True))


def row_blocks(x: Tensor, y: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Two tensors of one shape as pairs of blocks of whole rows; vectors whole, and elsewhere all tensors."""
    if not _is_cut(x) or x.dim() < 2:
        return [(x, y)]
    xs = x.split(max(1, BLOCK // max(1, x[0].numel())))
    return list(zip(xs, [None] * len(xs) if y is None else y.split(len(xs[0])), strict=True))


def _is_cut(x: Tensor) -> bool:
    return x.numel() > BLOCK and x.device.type == "cpu" and not torch.compiler.is_compiling()


def update_of(direction: Direction, step: Step) -> Callable[[Tensor, Tensor, list[Tensor], Any], None]:
    """`direction.update`; for Adam torch's fused kernel, one pass over memory where the formula makes eight."""
    if type(direction) is not Adaptive or direction.eps_first:
        return direction.update
    count, (beta1, beta2) = torch.tensor(float(step.count)), direction.betas
    settings: dict[str, Any] = dict(lr=step.lr, beta1=beta1, beta2=beta2, weight_decay=step.weight_decay)
    settings |= dict(eps=direction.eps, amsgrad=direction.amsgrad, maximize=False)

    def update(p: Tensor, gradient: Tensor, state: list[Tensor], n: Any) -> None:
        m, v, *largest = state
        if p.device.type == "cpu" and all(t.is_contiguous() for t in (p, gradient, m, v)):
            torch._fused_adamw_([p], [gradient], [m], [v], largest, [count], **settings)
        else:
            direction.update(p, gradient, state, n)

    return update
