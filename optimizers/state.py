"""Optimizer state by parameter name, for checkpoints that outlive one process count."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def named_state(optimizer: Optimizer, model: nn.Module, rank: int = 0) -> dict[str, Tensor]:
    """State tensors as "parameter/key" that this rank is to write: what it owns, and on rank 0 what all ranks hold."""
    owner = getattr(optimizer, "owner", {})
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, p in model.named_parameters()
        if p in optimizer.state and owner.get(p, 0) == rank
        for key, value in optimizer.state[p].items()
    }


def load_named_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put named state back into an optimizer over the same parameters, on any number of processes.

    Raises ValueError if the state belongs to another optimizer or to other shapes.
    """
    names = {p: name for name, p in model.named_parameters()}
    keys: dict[str, list[str]] = defaultdict(list)
    for full in saved:
        name, _, key = full.rpartition("/")
        keys[name].append(key)
    state = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {}
    for i, p in enumerate(order):
        name = names[p]
        held = optimizer.state.get(p)  # allocated up front by our own optimizers; empty in torch's before a step
        if held is not None and held.keys() != set(keys[name]):
            raise ValueError(f"optimizer state of {name}: saved {sorted(keys[name])}, expected {sorted(held)}")
        state["state"][i] = {key: saved[f"{name}/{key}"] for key in keys[name]}
        for key, tensor in state["state"][i].items():
            if tensor.dim() and tensor.shape != p.shape:
                raise ValueError(f"optimizer state {name}/{key}: shape {tuple(tensor.shape)}, not {tuple(p.shape)}")
        if not keys[name] and saved:
            raise ValueError(f"optimizer state of {name}: missing")
    optimizer.load_state_dict(state)
