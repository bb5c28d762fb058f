"""What an optimizer refuses: unsuitable parameters, gradients, and the state of other optimizers."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .directions import State
from .roles import ROLES
from .shards import check_gradient, sharded_as

OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")  # their keys in groups
DTYPES = (torch.float32, torch.float64)


def group_errors(group: dict[str, Any], settings: Iterable[str], role_of: Callable[[Tensor], str]) -> list[str]:
    """What is wrong with a parameter group beside its settings.

    settings: the keys of all settings. role_of: gives the role of a parameter of this group.
    """
    n, out = group.get("blocks", 1), []
    known = [*settings, "role", "blocks", "params", "constructed_lr"]
    for key in group.keys() - {*known, *OF_SCHEDULERS}:
        if likely := get_close_matches(key, known, n=1, cutoff=0.8):
            return [f"{key}={group[key]!r}: a group has no such setting; is {likely[0]} meant?"]
    if group.get("role") not in (None, *ROLES):
        return [f"role={group['role']!r}: must be one of {', '.join(ROLES)}"]
    if type(n) is not int or n < 1:
        return [f"blocks={n}: must be a whole number of at least 1"]
    for p in group["params"]:
        if p.dtype not in DTYPES or p.dtype != group["params"][0].dtype:
            out.append(f"parameter of dtype {p.dtype}: must be float32 or float64, the same in the whole group")
        elif role_of(p) == "matrix" and p.dim() < 2:
            out.append(f"parameter of shape {tuple(p.shape)}: has the role of a matrix and is none")
        elif p.dim() and p.shape[0] % n:
            out.append(f"blocks={n}: does not divide the rows of shape {tuple(p.shape)}")
    return out


def check_gradients(params: list[Tensor]) -> None:
    """Raises ValueError for a gradient that is sparse, not float32 or float64, or not sharded as its parameter."""
    for p in params:
        if (g := p.grad) is None:
            continue
        check_gradient(p)
        if g.is_sparse or g.dtype not in DTYPES:
            kind = "sparse" if g.is_sparse else str(g.dtype)
            raise ValueError(
                f"gradient of a parameter of shape {tuple(p.shape)} is {kind}: must be dense and float32 or float64; "
                "for embeddings set sparse=False, for lower precision keep the weights in float32 and use autocast"
            )


def fitting_state(
    optimizer: Optimizer, loaded: Mapping[Tensor, State], owns: Callable[[Tensor], bool]
) -> dict[Tensor, State]:
    """The loaded state as this rank keeps it: sharded as its parameters are, and without what only owners keep.

    owns: whether this rank is the owner of a parameter.
    Raises ValueError if the state of some parameters is not of the kind and shape of the present state.
    """
    out = dict(loaded)
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        ours, saved = optimizer.state.get(p, {}), out.get(p, {})
        if not owns(p):
            saved = {key: t for key, t in saved.items() if key in ours}
        if not p.requires_grad and not (ours and saved):
            continue  # as in torch, a frozen parameter may be without state
        if bool(ours) != bool(saved):
            raise ValueError("state_dict: its state is that of other parameters")
        if ours.keys() != saved.keys():
            raise ValueError(f"state_dict: parameter {number} has {sorted(saved)}, expected {sorted(ours)}")
        for key, t in ours.items():
            if t.shape != torch.as_tensor(saved[key]).shape:
                raise ValueError(f"state_dict: {key} of parameter {number} has another shape than {tuple(t.shape)}")
        out[p] = sharded_as(ours, saved, number)
    return out


def check_groups(optimizer: Optimizer, groups: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
    """Raises ValueError if loaded groups lack a setting, because another kind of optimizer made them."""
    for group in groups:
        if missing := sorted(settings.keys() - group.keys()):
            name = type(optimizer).__name__
            raise ValueError(f"state_dict: a group has no {', '.join(missing)}; it is not a {name}'s")
