"""Clipping by global norm, and the stop before a gradient that is not finite, without asking the device."""

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class NonFiniteError(ValueError):
    """Loss or gradient was not finite at `step`; no update was applied from that step on."""

    def __init__(self, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


class Guard:
    """Prepares the gradients of a model for the update.

    The optimizer receives the clipping factor and the decision to skip as device scalars, by the
    protocol of torch's gradient scaler: it divides gradients by `grad_scale`, and does nothing where
    `found_inf` is 1. So no step waits for the device, and clipping costs no pass of its own. Once a norm
    is not finite, that step and all later ones are skipped until `check` reports it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.max_norm = optimizer, max_norm
        device = self.parameters[0].device
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def clip(self, step: int) -> Tensor:
        """Hand clipping and skipping to the optimizer; returns the global gradient norm before clipping.

        Gradients are divided by max(1, (norm + 1e-6) / max_norm), as torch's clip_grad_norm_ does.
        """
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = (self._bad_step < 0) & ~torch.isfinite(norm)
        self._bad_step = torch.where(bad, step, self._bad_step)
        self.optimizer.found_inf = (self._bad_step >= 0).float()
        self.optimizer.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0) if self.max_norm else None
        return norm

    def check(self) -> None:
        """Wait for the device and raise NonFiniteError, naming the first bad step, if there was one."""
        step = int(self._bad_step)
        if step >= 0:
            raise NonFiniteError(
                f"the gradient of step {step} (counted from 0) is not finite; it was not applied, "
                "and the checkpoints before it are good",
                step,
            )
