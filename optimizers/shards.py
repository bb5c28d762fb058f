"""Sharded parameters, the DTensors that `fully_shard` makes: which part a rank holds, and which kinds are refused."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .directions import State


def local(t: Any) -> Any:
    """This rank's part of a tensor; a tensor that is not sharded, and None, as they are."""
    return t.to_local() if hasattr(t, "device_mesh") else t  # as is_dtensor, without a call: runs in every step


def cut(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor, sharded as `like` is: a copy of this rank's part. Every rank has the whole tensor."""
    if not is_dtensor(like) or is_dtensor(whole):
        return whole
    from torch.distributed.tensor import DTensor

    part, mesh = whole, like.device_mesh
    if found := sharding_of(like):
        rank, dim, shapes = mesh.get_local_rank(found[0]), found[1], shard_shapes(like)
        part = whole.narrow(dim, sum(shape[dim] for shape in shapes[:rank]), shapes[rank][dim])
    part = part.to(like.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights by name; a sharded model takes its shards of them. Raises RuntimeError if they do not fit."""
    present = dict(model.named_parameters())
    model.load_state_dict({name: cut(t, present.get(name)) for name, t in weights.items()})


def is_dtensor(t: Any) -> bool:
    """Whether a tensor is a DTensor, without importing a module that most users do not need."""
    return hasattr(t, "device_mesh")


def sharding_of(p: Tensor) -> tuple[int, int] | None:
    """The dimension of the mesh that shards a parameter, and of the parameter; None if each rank has all of it."""
    if not is_dtensor(p):
        return None
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    found = [(i, place.dim) for i, place in enumerate(placements) if place.is_shard() and mesh.size(i) > 1]
    return found[0] if found else None


def shard_shapes(p: Tensor) -> list[torch.Size]:
    """The shape of each rank's shard. As torch cuts, the first ranks have equal lengths and the last ones less."""
    mesh_dim, dim = sharding_of(p) or (0, 0)
    ranks, length = p.device_mesh.size(mesh_dim), p.size(dim)  # type: ignore[attr-defined]
    most = -(-length // ranks)
    lengths = [len(range(length)[rank * most : (rank + 1) * most]) for rank in range(ranks)]
    return [torch.Size([*p.shape[:dim], n, *p.shape[dim + 1 :]]) for n in lengths]


def sharding_errors(params: Iterable[Tensor], first: Tensor | None, divided: bool) -> list[str]:
    """What is wrong with the way in which parameters are sharded, and what to do.

    first: a sharded parameter that the optimizer has already. divided: whether the optimizer has a process group.
    """
    out = []
    for p in params:
        name = f"parameter of shape {tuple(p.shape)}"
        if getattr(p, "_fsdp_flattened", False):
            out.append(f"{name} was flattened by FullyShardedDataParallel; use fully_shard instead")
        if not is_dtensor(p):
            continue
        if divided:
            out.append(f"process_group beside a DTensor: leave it out, the mesh of the {name} says who shares the work")
        elif problem := _problem(p, first):
            out.append(f"{name}, with placements {p.placements}, {problem}")  # type: ignore[attr-defined]
        else:
            first = p if first is None and sharding_of(p) else first
    return out


def _problem(p: Tensor, first: Tensor | None) -> str | None:
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if any(place.is_partial() for place in placements):
        return "is a sum that is not finished; redistribute it to Shard or Replicate first"
    if any(type(place).__name__ not in ("Shard", "Replicate") for place in placements):
        return "is sharded in strides, as by fully_shard after tensor parallelism; use fully_shard alone"
    if sum(place.is_shard() and mesh.size(i) > 1 for i, place in enumerate(placements)) > 1:
        return "is sharded over two dimensions of its mesh; shard over one and replicate over the other (HSDP)"
    if sharding_of(p) is None:
        return None
    try:
        mesh.get_group(sharding_of(p)[0])  # type: ignore[index]
    except (RuntimeError, ValueError):
        return "has a mesh without process groups; make it by init_device_mesh, in a process that takes part in it"
    if first is not None and (mesh, sharding_of(first)[0]) != (first.device_mesh, sharding_of(p)[0]):  # type: ignore
        return "is sharded over another mesh than the parameters before it; give each mesh an optimizer of its own"
    if local(p).shape != shard_shapes(p)[mesh.get_local_rank(sharding_of(p)[0])]:  # type: ignore[index]
        return f"has a shard of shape {tuple(local(p).shape)} here; cut it as fully_shard and distribute_tensor do"
    return None


def check_gradient(p: Tensor) -> None:
    """Raises ValueError if a gradient is not sharded as its parameter is."""
    if getattr(p.grad, "placements", None) != getattr(p, "placements", None):
        found, wanted = getattr(p.grad, "placements", None), getattr(p, "placements", None)
        raise ValueError(
            f"gradient of a parameter of shape {tuple(p.shape)} has placements {found}, not {wanted}: "
            "redistribute it first, as by p.grad = p.grad.redistribute(placements=p.placements)"
        )


def sharded_as(ours: State, saved: State, number: int) -> State:
    """Loaded state with whole tensors cut into shards where ours are; nothing is sent.

    Raises ValueError if it is sharded in another way than ours.
    """
    out = dict(saved)
    for key, t in ours.items():
        if is_dtensor(t) and not is_dtensor(saved[key]):
            out[key] = cut(saved[key], t)
        elif is_dtensor(saved[key]) and (not is_dtensor(t) or _layout(saved[key]) != _layout(t)):
            raise ValueError(
                f"state_dict: {key} of parameter {number} is sharded in another way than the parameter; "
                "load it by torch.distributed.checkpoint"
            )
    return out


def _layout(t: Any) -> tuple:
    return t.device_mesh, t.placements
