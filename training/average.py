"""An exponential moving average of the weights, evaluated and saved beside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optimizers.shards import cut, local


@contextmanager
def weights_in_model(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Temporarily replace the weights of a model, by name; the originals are restored at the end.

    Memory: a second copy of the weights inside.
    """
    present = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(weights)  # also refreshes bfloat16 copies of the weights, which copy_ would not
    try:
        yield
    finally:
        model.load_state_dict(present)


class WeightAverage:
    """average <- d average + (1 - d) weights after every update, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets the average forget the initial weights. Memory: one copy of the weights on
    the same device, in every process; with `shard`, one shard.
    """

    def __init__(self, model: nn.Module, decay: float, saved: Mapping[str, Tensor] | None) -> None:
        """saved: the average of the run that is resumed; None: start with the present weights."""
        self.decay = decay
        self.parameters: list[Tensor] = list(model.parameters())
        self.averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, tensor in (saved or {}).items():
            self.averaged[name].copy_(cut(tensor, self.averaged[name]))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after `step` updates: one pass over the weights."""
        d = min(self.decay, (1 + step) / (10 + step))
        averaged, present = map(local, self.averaged.values()), map(local, self.parameters)
        torch._foreach_lerp_(list(averaged), list(present), weight=1 - d)
