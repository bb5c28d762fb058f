"""Optimizer state by parameter name, for checkpoints that outlive one process count."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def named_state(optimizer: Optimizer, model: nn.Module, rank: int = 0) -> dict[str, Tensor]:
    """State tensors as "parameter/key" that this rank is to write: what it owns, and on rank 0 what all ranks hold."""
    owner = getattr(optimizer, "owner", {})
    return {
        f"{name}/{key}": value if value.dim() else value.clone()  # step counts may be one shared tensor
        for name, p in model.named_parameters()
        if p in optimizer.state and owner.get(p, 0) == rank
        for key, value in optimizer.state[p].items()
    }


def load_named_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put named state back into an optimizer over the same parameters, on any number of processes.

    Each rank reads what it holds. Raises ValueError if the state is another optimizer's or of other shapes.
    """
    if not saved and not optimizer.state:
        return  # torch's classes have no state before their first step
    names = {p: name for name, p in model.named_parameters()}
    keys: dict[str, set[str]] = defaultdict(set)
    for full in saved:
        name, _, key = full.rpartition("/")
        keys[name].add(key)
    state = optimizer.state_dict()
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = names[p]
        if optimizer.state and p not in optimizer.state:
            continue  # another rank's
        expected = set(optimizer.state[p]) if optimizer.state else keys[name]
        if not keys[name] or keys[name] != expected:
            raise ValueError(
                f"optimizer state of {name}: saved {sorted(keys[name])}, expected {sorted(expected) or 'some'}; "
                "it belongs to another optimizer"
            )
        state["state"][i] = {key: saved[f"{name}/{key}"] for key in sorted(keys[name])}
        for key, tensor in state["state"][i].items():
            if tensor.dim() and tensor.shape != p.shape:
                raise ValueError(f"optimizer state {name}/{key}: shape {tuple(tensor.shape)}, not {tuple(p.shape)}")
    optimizer.load_state_dict(state)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state this process holds or, for torch's AdamW before its first step, will hold."""
    if isinstance(optimizer, AdamW) and not optimizer.state:
        return sum(2 * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    tensors = (t for state in optimizer.state.values() for key, t in state.items() if key != "step")
    return sum(t.numel() * t.element_size() for t in tensors)
