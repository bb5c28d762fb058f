"""How the processes of a run divide the work: replicas by DistributedDataParallel, or shards by torch's FSDP2.

Sharded weights, gradients and optimizer state are DTensors. Each block of the model is gathered before it computes and
dropped after it; the optimizers work on the shards themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model import GPT
from optimizers.shards import is_dtensor
from runtime.distributed import World
from runtime.errors import UserError
from training.compute import ComputeConfig, bucket_size


def shards(kind: str, world: World) -> int:
    """Over how many processes each weight is divided; 1: every process has all weights.

    kind: "none", "full" (over all processes) or "hybrid" (over those of a machine). Raises UserError for a hybrid of
    machines that have different numbers of processes, or one process each.
    """
    if kind == "none":
        return 1
    if kind == "hybrid" and world.size % world.local_size:
        raise UserError(
            f"shard=hybrid: {world.size} processes do not divide into machines of {world.local_size}; "
            "start equally many on each machine, or use --shard=full"
        )
    if kind == "hybrid" and world.size > world.local_size == 1:
        raise UserError("shard=hybrid: each machine has one process (LOCAL_WORLD_SIZE is 1); use --shard=full")
    return world.size if kind == "full" else world.local_size


def shard(model: GPT, kind: str, world: World, compiles: bool) -> None:
    """Shard a model in place: block by block, then the rest. Compiles each block and the loss before, if wanted.

    The whole model cannot be one graph here, because blocks are gathered between them.
    """
    if compiles:
        # the blocks have one code object, and each may need graphs of its own for training and evaluation
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * model.config.n_layer)
        for part, name in (*((block, "forward") for block in model.transformer.h), (model, "loss")):
            setattr(part, name, torch.compile(getattr(part, name), fullgraph=True, dynamic=False))
    mesh = _mesh(kind, world)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh)


def _mesh(kind: str, world: World) -> DeviceMesh:
    """All processes, or machines x processes. Groups that torch makes would wait 30 minutes for a lost rank."""
    if kind == "full":
        return init_device_mesh(world.device.type, (world.size,))
    ranks = torch.arange(world.size).view(-1, world.local_size)
    groups = [world.subgroup(lists.tolist()) for lists in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=("replicate", "shard"))


def description(kind: str, world: World) -> str:
    """What is divided over which processes, in words; empty if nothing is."""
    if (each := shards(kind, world)) == 1:
        return ""
    copies = f", {world.size // each} copies" if kind == "hybrid" else ""
    return f"{kind}: weights, gradients and state divided over {each} processes{copies}"


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def synchronized(model: GPT, compiled: Any, config: ComputeConfig, world: World) -> Any:
    """The model whose backward pass averages gradients over the processes. compiled: the model, compiled or not.

    DistributedDataParallel exchanges gradients in buckets of memory. Gradients lie in the buckets and nowhere else, if
    the first pass exchanges them and if they are set to 0, not to None, as `clear_gradients` does. torch arranges the
    buckets at the first pass, and again at the second one. Both happen here, in passes whose gradients are 0. So a
    resumed run adds up its gradients in the same order as a run that was not interrupted.
    """
    if world.size == 1 or is_sharded(model):
        return compiled
    both = _ComputesOrTouches(compiled)
    forward = DistributedDataParallel(both, bucket_cap_mb=bucket_size(model, config), gradient_as_bucket_view=True)
    for _ in range(2):
        forward().backward()
    return forward


class _ComputesOrTouches(nn.Module):
    """A model that returns 0 without arguments; then the gradients of all its parameters are 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs) if inputs else sum(p.sum() * 0 for p in self.parameters())  # type: ignore


def clear_gradients(model: Any, optimizer: Optimizer) -> None:
    """Drop the gradients; those in the buckets of DistributedDataParallel become 0. model: from `synchronized`."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def unsynchronized(model: Any) -> AbstractContextManager[None]:
    """A context in which backward passes do not average gradients over the processes. model: from `synchronized`."""
    if is_sharded(model):
        return _without_reduction(model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def _without_reduction(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def whole_weights(model: GPT) -> Iterator[None]:
    """Give every process all weights, so that forward passes inside need no communication.

    Every process must enter; each may then compute as often as it likes. Memory: the weights.
    """
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # as `fully_shard` sets it


def uncompiled(model: GPT) -> AbstractContextManager[object]:
    """A context in which the parts that `shard` compiled are not: for inputs of many shapes."""
    return torch.compiler.set_stance("force_eager") if "loss" in vars(model) else nullcontext()


def gathered(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Whole tensors, of sharded ones copies in host memory; empty on a process that does not want them.

    Every process must call it. One tensor at a time is whole on the device.
    """
    out = {}
    for name, t in tensors.items():
        whole = t.full_tensor().cpu() if is_dtensor(t) else t  # type: ignore[attr-defined]
        if wanted:
            out[name] = whole
    return out
