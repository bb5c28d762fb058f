"""The validation loss, computed by all ranks together."""

import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from data.loader import ValidationSet
from runtime.clipping import NonFiniteError
from runtime.distributed import StopRequest, World


@torch.no_grad()
def validation_loss(
    validation: ValidationSet,
    step: int,
    model: nn.Module,
    world: World,
    autocast: AbstractContextManager,
    stop: StopRequest,
) -> float | None:
    """Mean loss in nats per token over the validation windows. Each rank computes a part of the batches.

    Returns None if a stop request interrupted a rank. Raises NonFiniteError if the loss is not finite.
    """
    # one place per batch, so that the order of the sum does not depend on the number of ranks
    sums = torch.zeros(2, len(validation), dtype=torch.float64, device=world.device)
    model.eval()
    for number in range(world.rank, len(validation), world.size):
        if stop.signal:
            break
        idx, targets, windows = validation.inputs(number, step, world.device)
        with autocast:
            sums[0, number] = model(idx, targets).double() * windows
        sums[1, number] = windows
    model.train()
    loss_sum, windows = world.sum(sums).sum(dim=1).tolist()
    if windows < validation.count:
        return None
    if not math.isfinite(loss_sum):
        raise NonFiniteError(
            f"the validation loss of step {step} is not finite; this step is not saved, "
            "and the checkpoints before it are good; use a smaller --lr, or --fresh to start over"
        )
    return loss_sum / windows
