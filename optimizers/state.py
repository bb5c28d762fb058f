"""Optimizer state by parameter name, for checkpoints that outlive one number of processes.

Works for any torch optimizer that keeps its state per parameter: tensors of any shape, and numbers. A Python number is
stored as a 0-d tensor under a key that ends in its type: "h.0.weight/step#int".
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .owners import Owners
from .shards import cut, is_dtensor, local, sharding_of

NUMBERS = {"bool": bool, "int": int, "float": float}
TENSOR_OF = {bool: torch.bool, int: torch.int64, float: torch.float64}


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of all groups, in order."""
    return (p for group in optimizer.param_groups for p in group["params"])


def named_state(optimizer: Optimizer, model: nn.Module, rank: int = 0) -> dict[str, Tensor]:
    """The state that this rank writes, as "parameter/key": the state it owns, and on rank 0 the state of all ranks.

    Sharded state is gathered, so every rank must call this, and copied to host memory, one tensor at a time. The
    parameters are divided over the ranks that write.
    """
    out = {}
    for number, (name, p) in enumerate(model.named_parameters()):
        writes = _writer(optimizer, p, number) == rank
        for key, value in optimizer.state.get(p, {}).items():
            if is_dtensor(value):
                value = value.full_tensor().cpu()
            if not writes:
                continue
            if isinstance(value, Tensor):
                out[f"{name}/{key}"] = value if value.dim() else value.clone()  # parameters may share a step count
            elif value is not None:
                out[f"{name}/{key}#{type(value).__name__}"] = torch.tensor(value, dtype=TENSOR_OF[type(value)])
    return out


def _owners(optimizer: Optimizer, p: Tensor) -> Owners:
    return optimizer.owners_of(p) if hasattr(optimizer, "owners_of") else Owners()


def _writer(optimizer: Optimizer, p: Tensor, number: int) -> int:
    """The rank that writes the state of a parameter: its owner, if it has one. number: its position in the model."""
    divided = sharding_of(p)
    otherwise = number % p.device_mesh.size(divided[0]) if divided else 0  # type: ignore[attr-defined]
    return _owners(optimizer, p).owner.get(p, otherwise)


def load_named_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put named state back into an optimizer over the same parameters, on any number of processes.

    Each rank reads what it holds. Raises ValueError if another kind of optimizer made it, or if shapes differ.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    keys: dict[str, list[str]] = defaultdict(list)
    for full in sorted(saved):
        name, _, key = full.rpartition("/")
        keys[name].append(key)
    allocated = bool(optimizer.state)  # if not, a class of torch allocates at its first step and keeps what is loaded
    state = optimizer.state_dict()
    for i, p in enumerate(parameters_of(optimizer)):
        name, present = names[p], optimizer.state.get(p, {})
        if allocated and p not in optimizer.state:
            continue  # another rank owns this state
        found = {key.partition("#")[0]: key for key in keys[name]}
        if not _owners(optimizer, p).owns(p):  # this rank only counts the steps of this parameter
            found = {key: full for key, full in found.items() if key in present}
        if allocated and found.keys() != present.keys():
            raise ValueError(
                f"optimizer state of {name}: saved {sorted(found) or 'nothing'}, expected {sorted(present)}; "
                "it belongs to another optimizer"
            )
        values = {key: _value(full, saved[f"{name}/{full}"]) for key, full in found.items()}
        for key, value in values.items():
            if isinstance(present.get(key), Tensor) and present[key].shape != torch.as_tensor(value).shape:
                shapes = f"shape {tuple(torch.as_tensor(value).shape)}, not {tuple(present[key].shape)}"
                raise ValueError(f"optimizer state {name}/{key}: {shapes}; it belongs to another optimizer or model")
            if isinstance(value, Tensor) and value.shape == p.shape:
                values[key] = cut(value, present.get(key, p))
        if values:
            state["state"][i] = values
    optimizer.load_state_dict(state)
    for i, p in enumerate(parameters_of(optimizer)):
        for key, value in state["state"].get(i, {}).items():
            loaded = optimizer.state[p][key]
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:  # torch casts to the parameter's dtype
                optimizer.state[p][key] = value.to(loaded.device)


def _value(key: str, tensor: Tensor) -> Tensor | bool | int | float:
    kind = key.partition("#")[2]
    return NUMBERS[kind](tensor.item()) if kind else tensor


def state_problem(optimizer: Optimizer, model: nn.Module) -> str | None:
    """The part of an optimizer's state that a checkpoint cannot keep, in words; None if there is none.

    Called before the first step, so that an unsuitable optimizer is refused before it has trained.
    """
    names, known = {id(p): name for name, p in model.named_parameters()}, set(parameters_of(optimizer))
    samples = [(p, s) for p, s in optimizer.state.items()] or [(p, s) for p, _, s in _first_states(optimizer)]
    for p, state in samples:
        if optimizer.state and p not in known:
            return "it keeps state that belongs to no parameter"
        for key, value in state.items():
            if not (value is None or type(value) in TENSOR_OF or _is_plain_tensor(value)):
                return f'the state "{key}" of {names.get(id(p), "a parameter")} is a {type(value).__name__}'
    return None


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state in this process, or the bytes that a class of torch will allocate at its first step."""
    if optimizer.state:
        tensors = [t for state in optimizer.state.values() for key, t in state.items() if key not in ("step", "count")]
        return sum(local(t).nbytes for t in tensors if isinstance(t, Tensor))
    return sum(
        group_numel * value.element_size()
        for p, group_numel, state in _first_states(optimizer)
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == p.shape
    )


def _first_states(optimizer: Optimizer) -> list[tuple[Tensor, int, dict[str, Any]]]:
    """The state that a first step creates, found by a step on copies of a few small parameters.

    For each group and number of dimensions: the smallest parameter, the number of elements that this process has of all
    such parameters, and the state of the smallest one.
    """
    out = []
    for group in optimizer.param_groups:
        alike: dict[int, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            alike[p.dim()].append(p)
        for members in alike.values():
            smallest = min(members, key=lambda p: p.numel())
            probe, twin = copy.copy(optimizer), torch.zeros_like(smallest, requires_grad=True)
            twin.grad = torch.zeros_like(twin)
            probe.param_groups, probe.state = [{**group, "params": [twin]}], defaultdict(dict)
            # a copy lacks this mark; without it, torch looks for "capturable" on GPU machines, and Adafactor has none
            probe._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
            probe.step()
            out.append((smallest, sum(local(p).numel() for p in members), dict(probe.state[twin])))
    return out
