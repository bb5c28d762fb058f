"""What the trainer measures between steps, by all ranks together: validation loss, HellaSwag, bad sequences."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from data.hellaswag import HellaSwag
from data.loader import TrainLoader, ValidationSet, to_device
from data.shards import DataError, Dataset
from model import GPT
from optimizers.shards import load_whole, local
from runtime.distributed import StopRequest, World
from training.average import weights_in_model
from training.checkpoint import Checkpoint
from training.clipping import NonFiniteError
from training.parallel import uncompiled, whole_weights


class Evaluator:
    """Scores the present weights of a run.

    forward: the model, compiled or not. hellaswag: items to score, if the run wants them.
    """

    def __init__(
        self,
        model: GPT,
        forward: Any,
        autocast: AbstractContextManager,
        validation: ValidationSet,
        hellaswag: HellaSwag | None,
        dataset: Dataset,
        world: World,
    ) -> None:
        self.model, self.forward, self.autocast = model, forward, autocast
        self.validation, self.hellaswag, self.world = validation, hellaswag, world
        self.bytes_per_token = dataset.bytes_per_token("val")  # None if not known
        if problem := world.from_main(dataset.changed_shard("val") if world.is_main else None):
            raise DataError(problem)  # nothing else would show that every validation loss is wrong
        # two losses may be compared if all of these are equal
        self.measured_on = {
            "data": world.from_main(validation.fingerprint() if world.is_main else ""),
            "windows": validation.count,
            "tokens": validation.count * validation.windows.block_size,
            "sampling": "random" if validation.random else "fixed",
            "tokenizer": (dataset.tokenizer or {}).get("name"),
            "bytes_per_token": self.bytes_per_token,
        }

    def comparable_losses(self, state: dict) -> tuple[float | None, float | None]:
        """val_loss and best_val_loss of a checkpoint's state.json; None if they were measured on something else."""
        before = state.get("measured_on") or self.measured_on
        if changed := [key for key, value in self.measured_on.items() if before.get(key) != value]:
            other = f"validation has other {', '.join(changed)} than before"
            self.world.say(f"note: {other}; earlier losses do not count as the best one")
            return None, None
        return state.get("val_loss"), state.get("best_val_loss")

    def scores(
        self, step: int, stop: StopRequest, average: Mapping[str, Tensor] | None, with_hellaswag: bool
    ) -> dict[str, float] | None:
        """val_loss, and if the run has them, val_loss_average, val_bits_per_byte and the numbers of HellaSwag.

        average: the averaged weights, if the run keeps them. Returns None if a stop request interrupted the evaluation.
        """
        losses = {"val_loss": self.loss(step, stop)}
        if average:
            with weights_in_model(self.model, average):
                losses["val_loss_average"] = self.loss(step, stop)
        found = {key: loss for key, loss in losses.items() if loss is not None}
        if len(found) < len(losses):
            return None
        if self.bytes_per_token:
            found["val_bits_per_byte"] = self.bits_per_byte(found["val_loss"])
        if self.hellaswag and with_hellaswag:
            with whole_weights(self.model), uncompiled(self.model):
                found |= self.hellaswag.score(self.model, self.world, self.autocast)
        return found

    def bits_per_byte(self, loss: float) -> float:
        """A validation loss in nats per token as bits per byte of text; NaN if the dataset does not count its bytes."""
        return loss / (self.bytes_per_token or math.nan) / math.log(2)

    @torch.no_grad()
    def loss(self, step: int, stop: StopRequest) -> float | None:
        """Mean loss in nats per token over the validation windows. Each rank computes a part of the batches.

        Returns None if a stop request interrupted a rank. Raises NonFiniteError if the loss is not finite, and
        DataError if a rank cannot read its part, on every rank.
        """
        validation, world, model = self.validation, self.world, self.forward
        # one place per batch, so that the order of the sum does not depend on the number of ranks
        sums = torch.zeros(len(validation), dtype=torch.float64, device=world.device)
        interrupted, unreadable = False, None
        model.eval()
        with whole_weights(self.model):
            for number in range(world.rank, len(validation), world.size):
                if interrupted := stop.signal is not None:
                    break
                try:
                    idx, targets, windows = validation.inputs(number, step, world.device)
                except DataError as error:
                    unreadable = error
                    break
                with self.autocast:
                    sums[number] = model(idx, targets).double() * windows
        model.train()
        world.raise_first(unreadable)
        if any(world.gather(interrupted)):
            return None
        loss_sum = world.sum(sums).sum().item()
        if not math.isfinite(loss_sum):
            raise NonFiniteError(
                f"the validation loss of step {step} is not finite; this step is not saved, "
                "and the checkpoints before it are good; use a smaller --lr, or --fresh to start over"
            )
        return loss_sum / validation.count


@torch.no_grad()
def bad_samples(
    loader: TrainLoader,
    step: int,
    model: GPT,
    autocast: AbstractContextManager,
    world: World,
    saved: Callable[[], Checkpoint | None],
) -> str:
    """The sequences of a step's batch whose loss is not finite, as text.

    saved: returns the newest undamaged checkpoint, or None.
    """

    def loss_of(row: Tensor) -> Tensor:
        with autocast:
            return model(*to_device(row[None], world.device))

    lost = not all(torch.isfinite(local(p)).all() for p in model.parameters())
    if any(world.gather(lost)):  # on a GPU the bad update is in the weights
        if (found := saved()) is None:
            return "unknown, because the weights are lost and there is no checkpoint"
        load_whole(model, found.model())
    with whole_weights(model), uncompiled(model):
        bad = [name for names in world.gather(loader.bad_samples(step, loss_of)) for name in names]
    if len(bad) in (0, loader.batch_size):
        return f"{'all have' if bad else 'no single one has'} a loss that is not finite, so a smaller --lr may help"
    return ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
