"""Gradient clipping by global norm, and the stop at a gradient that is not finite."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from optimizers.shards import is_dtensor
from runtime.errors import UserError
from runtime.hardware import to_host


class NonFiniteError(UserError):
    """Loss or gradient was not finite at `step`. Nothing from that step on was saved."""

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


class GradientClipper:
    """Clips the gradients of a model and stops the run at a gradient that is not finite.

    On a CPU `clip` raises before such a gradient is applied. On a GPU the host must not wait for the device: the norm
    is copied to the host and checked in the next call of `clip`. By then the weights have received the bad update, so
    call `check` before anything is logged, evaluated or saved.
    """

    def __init__(self, model: nn.Module, max_norm: float, late: bool | None = None) -> None:
        """max_norm: largest global norm; 0: no clipping. late: check norms one call late; None: do so on a GPU."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_norm = max_norm or math.inf
        self.late = self.parameters[0].device.type != "cpu" if late is None else late
        self._norms: list[tuple[int, Callable[[], Tensor]]] = []  # steps and norms that were not checked yet

    def clip(self, step: int) -> Tensor:
        """Clip the gradients of a step and return their global norm before clipping.

        Raises NonFiniteError for this step on a CPU, and for the previous step on a GPU.
        """
        norm: Any = clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        if self.late:
            self.check()
        self._norms.append((step, to_host(norm)))
        if not self.late:
            self.check()
        return norm

    def check(self) -> None:
        """Check all norms, and wait for those that are not copied yet. Raises NonFiniteError for the first bad one."""
        while self._norms:  # never skip a norm: all ranks must stop at the same step
            step, norm = self._norms.pop(0)
            if not math.isfinite(norm()):
                message = f"the gradient of step {step} (counted from 0) is not finite; earlier checkpoints are good"
                raise NonFiniteError(message, step)
