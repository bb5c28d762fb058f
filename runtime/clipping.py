"""Gradient clipping by global norm, and the stop at a gradient that is not finite."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizers.norms import total_norm
from runtime.errors import UserError


class NonFiniteError(UserError):
    """Loss or gradient was not finite at `step`. No update was applied from that step on."""

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


class GradientClipper:
    """Clips the gradients of a model and prevents updates with gradients that are not finite.

    An optimizer with `_step_supports_amp_scaling`, as torch's fused classes and ours have, receives two device
    scalars: it divides gradients by `grad_scale`, and does nothing where `found_inf` is 1. So no step waits for the
    device. After the first norm that is not finite, that step and all later ones are skipped until `check` raises.
    For any other optimizer, `clip` waits for the device, checks the gradients and clips them before the step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = optimizer
        self.max_norm = max_norm
        self.optimizer_clips = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.parameters[0].device)

    def clip(self, step: int) -> Tensor:
        """Prepare the gradients of a step and return their global norm before clipping.

        Gradients are divided by max(1, (norm + 1e-6) / max_norm), as in torch's clip_grad_norm_.
        Raises NonFiniteError at once if the optimizer cannot skip a step by itself.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        bad = (self._bad_step < 0) & ~torch.isfinite(norm)
        self._bad_step = torch.where(bad, step, self._bad_step)
        largest = torch.finfo(torch.float32).max
        scale = ((norm + 1e-6) / self.max_norm).clamp(1.0, largest).float() if self.max_norm else None
        if self.optimizer_clips:
            self.optimizer.found_inf, self.optimizer.grad_scale = (self._bad_step >= 0).float(), scale
        else:
            self.check()
            if scale is not None:
                torch._foreach_div_(gradients, scale)
        return norm

    def check(self) -> None:
        """Wait for the device. Raises NonFiniteError with the first bad step, if there is one."""
        step = int(self._bad_step)
        if step >= 0:
            raise NonFiniteError(
                f"the gradient of step {step} (counted from 0) is not finite; it was not applied, "
                "and the checkpoints before it are good",
                step,
            )
