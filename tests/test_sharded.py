"""Sharded parameters: `fully_shard` over one mesh dimension, replicas over another, compared with the whole optimizer.

The processes run many cases each and report to the tests, because starting them takes longer than a case.
"""

import copy
import pickle
import re
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import finish, made_once
from forked import Forked
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import optimizers
from config.load import load_config
from model import GPT
from optimizers import MARS, MARSM, REGISTRY, SOAP, AdEMAMix, Muon
from optimizers.adamw import fused_adamw
from optimizers.directions import Adaptive, MatrixDirection, summed
from optimizers.matrices import families
from optimizers.newton_schulz import Orthogonal
from optimizers.owners import Owners
from optimizers.state import state_bytes

ROOT = Path(__file__).resolve().parent.parent
OURS = {name: partial(make, lr=1e-2) for name, (make, _) in REGISTRY.items() if make is not fused_adamw} | {
    "mars_raw": partial(MARS, lr=1e-2, second_moment="raw", optimize_1d=True),
    "mars_amsgrad": partial(MARS, lr=1e-2, amsgrad=True, optimize_1d=True),
    "mars_exact": partial(MARS, lr=1e-2, is_approx=False),
    "mars_lion": partial(MARS, lr=1e-2, mars_type="mars-lion"),
    "mars_shampoo": partial(MARS, lr=1e-2, mars_type="mars-shampoo"),
    "mars_m_exact": partial(MARSM, lr=1e-2, is_approx=False),
    "mars_m_unclipped": partial(MARSM, lr=1e-2, clip_c=False, keep_previous=True),
    "mars_m_one_buffer": partial(MARSM, lr=1e-2, clip_c=False),
    "muon_polar_express": partial(Muon, lr=1e-2, coefficients="polar_express"),
    "mars_m_cautious": partial(MARSM, lr=1e-2, weight_decay_kind="cautious"),
    "ademamix": partial(AdEMAMix, lr=1e-2, slow_warmup=5),
    "soap": partial(SOAP, lr=1e-2, refresh_every=2),
}


def adamw(groups):
    """torch's own, which knows no roles and wants whole parameters in groups of their own."""
    params = [p for group in groups for p in group["params"]]
    split = [[p for p in params if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return fused_adamw([{"params": part} for part in split if part], lr=1e-2)


EVERY = OURS | {"adamw": adamw}
MESHES = {2: [(2,), (2, 1), (1, 2)], 4: [(4,), (2, 2)]}
STEPS = 5
SAVED_AT = 3  # a step with another rate and another set of gradients before it than after it
KEPT = ("mars", "mars_m_exact", "normuon", "soap")  # whose checkpoints are tried: all kinds of state

# rows that 2 and 4 ranks cannot divide, ranks without a row, one row or column, three blocks, filters, float64
SHAPES = dict(wide=(6, 24), tall=(24, 6), late=(24, 6), filters=(6, 2, 3, 4), uneven=(11, 7), row=(1, 5), column=(5, 1))
SHAPES |= dict(qkv=(24, 8), float64=(9, 5), whole=(6, 4), table=(10, 6), gain=(16,), bias=(3,))
ROLES = dict(table="embedding", gain="vector", bias="vector")
FAMILIES = 5  # shapes of matrices among the sharded ones, a matrix and its transpose being one


def make_mesh(shape):
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def make_model(mesh=None):
    """Parameters of every kind, equal on all ranks; "whole" is not sharded."""
    g = torch.Generator().manual_seed(0)
    dtypes = {n: torch.float64 if n == "float64" else torch.float32 for n in SHAPES}
    values = {n: 0.1 * torch.randn(s, generator=g, dtype=dtypes[n]) for n, s in SHAPES.items()}
    model = nn.ParameterDict({n: nn.Parameter(x) for n, x in values.items()})
    return model if mesh is None else fully_shard(model, mesh=mesh, ignored_params={model["whole"]})


def groups_of(model):
    special = {"qkv": {"blocks": 3}, "float64": {}}
    groups = [{"params": [model[n]], "role": "matrix", **settings} for n, settings in special.items()]
    for role in ("matrix", "embedding", "vector"):
        params = [p for n, p in model.items() if ROLES.get(n, "matrix") == role and n not in special]
        groups.append({"params": params, "role": role})
    return groups


def cut(x, p):
    """A whole tensor, known to every rank, as a parameter is sharded."""
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def give(model, seed, scale=1.0):
    """Gradients that depend on the seed alone; their norms lie on both sides of 1. Returns the names without one."""
    g, step = torch.Generator().manual_seed(seed), seed % 1000
    without = {"late"} if step < 2 else {"wide", "bias"} if step == 3 else set()
    for n, p in model.items():
        x = (0.05, 1.0)[step % 2] * scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
        p.grad = None if n in without else cut(x, p)
    return without


def train(model, optimizer, start=0, stop=STEPS, counter=None):
    """Steps with a falling rate on gradients that depend on the step alone."""
    for step in range(start, stop):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        if getattr(optimizer, "needs_lookahead", False):
            give(model, step + 1000)
            optimizer.update_previous_grad()
        give(model, step)
        with counter or nullcontext():
            optimizer.step()
        if hasattr(optimizer, "update_last_grad"):
            optimizer.update_last_grad()
        optimizer.zero_grad()
    return {n: whole(p) for n, p in model.items()}


def fused(optimizer, model):
    """The parameters that torch's fused kernel updates; it rounds the last elements of a tensor otherwise."""
    if isinstance(optimizer, torch.optim.AdamW):
        return set(model)
    of = {p: optimizer.rule_of(group, p).direction for group in optimizer.param_groups for p in group["params"]}
    return {n for n, p in model.items() if type(of[p]) is Adaptive and not of[p].eps_first}


def differences(ours, expected):
    """The largest difference of each tensor that is not equal."""
    return {n: (ours[n] - x).abs().max().item() for n, x in expected.items() if not torch.equal(ours[n], x)}


# ---- processes


def on_ranks(n, body, folder):
    """Call body(folder) in n processes that talk by gloo; returns what it returns on rank 0."""
    finish(Forked(_join, body, folder, processes=n))
    return torch.load(folder / f"{body.__name__}.pt", weights_only=False)


def _join(body, folder):
    try:
        found = body(folder)
    except dcp.CheckpointException as error:  # no Exception, so its text would be lost
        raise RuntimeError(str(error)) from None
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{body.__name__}.pt")
    dist.barrier()
    dist.destroy_process_group()


def equalities(ranks, expected):
    """For every optimizer and mesh: what differs after STEPS steps, and the collectives of the last one."""
    out = {}
    for shape in MESHES[ranks]:
        mesh = make_mesh(shape)
        for name, make in EVERY.items():
            model = make_model(mesh)
            optimizer = make(groups_of(model))
            before = layout(optimizer)
            train(model, optimizer, 0, STEPS - 1)
            weights = train(model, optimizer, STEPS - 1, counter=(counter := CommDebugMode()))
            out[name, shape] = dict(
                different=differences(weights, expected[name]),
                fused=fused(optimizer, model),
                calls={str(op).rpartition(".")[2]: n for op, n in counter.get_comm_counts().items() if n},
                same_layout=before == layout(optimizer),
            )
    return out


def layout(optimizer):
    """Keys, shapes, types and placements of all state."""
    return {
        (i, key): (type(t), t.shape, t.dtype, getattr(t, "placements", None))
        for i, s in optimizer.state_dict()["state"].items()
        for key, t in s.items()
    }


def message_of(call):
    """What a call says that must raise ValueError."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def four(folder):
    """What 4 processes report; they save checkpoints after SAVED_AT steps."""
    dist.init_process_group("gloo")
    expected = torch.load(folder / "expected.pt")
    out = dict(equal=equalities(4, expected), loaded={})
    mesh = make_mesh((4,))
    out["bytes"], out["state"] = bytes_sent(mesh), divided_state(mesh)
    out["group sizes"] = exchanging_groups(make_mesh((2, 2)))
    for name in KEPT:
        model = make_model(mesh)
        optimizer = OURS[name](groups_of(model))
        train(model, optimizer, 0, SAVED_AT)
        save(folder / "four" / name, model, optimizer)
        model = make_model(mesh)
        optimizer = OURS[name](groups_of(model))
        load(folder / "one" / name, model, optimizer)
        out["loaded"]["one to four", name, "load"] = differences(train(model, optimizer, SAVED_AT), expected[name])
    both = DTensor.from_local(torch.ones(2, 2), make_mesh((2, 2)), (Shard(0), Shard(1)))
    lone = distribute_tensor(torch.ones(8, 4), mesh, (Shard(0),))
    pair = [distribute_tensor(torch.ones(8, 4), make_mesh((2, 2)), (Replicate(), Shard(0))), lone]
    out["two dimensions"] = message_of(lambda: Muon([nn.Parameter(both)]))
    out["two meshes"] = message_of(lambda: Muon(pair))
    return out


def save(folder, model, optimizer):
    dcp.save(dict(weights=model.state_dict(), state=get_optimizer_state_dict(model, optimizer)), checkpoint_id=folder)


def load(folder, model, optimizer, **options):
    """By torch's functions, which name parameters and take whole and sharded state."""
    saved = dict(weights=model.state_dict(), state=get_optimizer_state_dict(model, optimizer))
    dcp.load(saved, checkpoint_id=folder, **options)
    model.load_state_dict(saved["weights"])
    set_optimizer_state_dict(model, optimizer, saved["state"])


def load_in_place(folder, model, optimizer):
    """Straight into the tensors of weights and state."""
    saved = dict(weights=model.state_dict(), state=get_optimizer_state_dict(model, optimizer))
    dcp.load(saved, checkpoint_id=folder)


def bytes_sent(mesh):
    """Bytes that this rank sends in a step of Muon over eight equal matrices, in bfloat16."""
    model = fully_shard(nn.ParameterDict({f"m{i}": nn.Parameter(torch.ones(16, 32)) for i in range(8)}), mesh=mesh)
    optimizer = Muon(model.parameters(), ns_dtype="bfloat16")
    for p in model.values():
        p.grad = torch.ones_like(p)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        optimizer.step()
    return sum(call.args[1].nbytes for call in exchange.call_args_list)


def divided_state(mesh):
    """Bytes of state of each rank, over eight matrices and a table that the ranks can divide."""
    out = {}
    for name, make in OURS.items():
        shapes = {f"m{i}": (24, 16) for i in range(8)} | {"table": (40, 16)}
        model = nn.ParameterDict({n: nn.Parameter(torch.ones(s)) for n, s in shapes.items()})
        whole_state = state_bytes(make(two_groups(model)))
        fully_shard(model, mesh=mesh)
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, state_bytes(make(two_groups(model))))
        out[name] = (whole_state, held)
    return out


def two_groups(model):
    matrices = [p for n, p in model.items() if n != "table"]
    return [{"params": matrices, "role": "matrix"}, {"params": [model["table"]], "role": "embedding"}]


def exchanging_groups(mesh):
    """Sizes of the groups that talk in a step under HSDP: those of the ranks that share one copy."""
    model = make_model(mesh)
    optimizer = OURS["mars_m"](groups_of(model))
    give(model, 2)
    names = ("all_to_all_single", "all_reduce", "all_gather_into_tensor", "broadcast", "all_gather")
    with ExitStack() as stack:
        spies = [mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in names]
        calls = dict(zip(names, [stack.enter_context(spy) for spy in spies], strict=True))
        optimizer.step()
    groups = [(name, call.kwargs.get("group")) for name, spy in calls.items() for call in spy.call_args_list]
    return {(name, dist.get_world_size(group)) for name, group in groups}


def two(folder):
    """What 2 processes report; they continue the checkpoints of 4 and of 1, and save for 1 and for themselves."""
    dist.init_process_group("gloo")
    expected = torch.load(folder / "expected.pt")
    out = dict(equal=equalities(2, expected), refused=refusals(folder), loaded={})
    mesh = make_mesh((2,))
    for name in KEPT:
        for source, way in (("four", load), ("four", load_in_place), ("one", load), ("one", load_in_place)):
            model = make_model(make_mesh((2,) if way is load else (1, 2)))
            optimizer = OURS[name](groups_of(model))
            way(folder / source / name, model, optimizer)
            train(model, optimizer, SAVED_AT, SAVED_AT + 1)
            if source == "four" and way is load:
                save(folder / "two" / name, model, optimizer)
            weights = train(model, optimizer, SAVED_AT + 1)
            out["loaded"][f"{source} to two", name, way.__name__] = differences(weights, expected[name])
        for source in ("four", "two"):
            model = make_model()
            optimizer = OURS[name](groups_of(model), process_group=dist.group.WORLD)  # as with DistributedDataParallel
            load(folder / source / name, model, optimizer)
            start = SAVED_AT + (source == "two")
            if source == "four":
                save(folder / "ddp" / name, model, optimizer)
            out["loaded"][f"{source} to ddp", name, "load"] = differences(
                train(model, optimizer, start), expected[name]
            )
        model = make_model(mesh)
        optimizer = OURS[name](groups_of(model))
        load(folder / "ddp" / name, model, optimizer)
        out["loaded"]["ddp to two", name, "load"] = differences(train(model, optimizer, SAVED_AT), expected[name])
        out["loaded"]["one to two", name, "load_state_dict"] = from_a_whole_state_dict(folder, name, mesh, expected)
        out["loaded"]["one to two", name, "load after Accelerate"] = in_accelerates_order(folder, name, mesh, expected)
    out["copies"] = {name: copies(name, mesh) for name in KEPT}
    out["scaler"] = scaled(mesh, expected["mars_m"])
    out["clip_grad_norm"] = clipped(mesh), clipped(None)
    out["schedule"] = scheduled(mesh), scheduled(None)
    out["tied"], out["mixed"] = tied(mesh), mixed_precision(mesh)
    out["columns"] = {name: by_columns(name, mesh) for name in ("muon", "mars_m")}
    out["bfloat16"] = in_bfloat16(mesh), in_bfloat16(None)
    out["dtype"] = after_loading_another_dtype(mesh)
    out["compiled"] = compiled(mesh, "mars_m"), compiled(mesh, "mars")
    return out


def from_a_whole_state_dict(folder, name, mesh, expected):
    """The state dict of a process that is alone is cut into shards by load_state_dict, without torch's checkpoints."""
    model = make_model(mesh)
    optimizer = OURS[name](groups_of(model))
    weights, state = torch.load(folder / f"{name}.pt", weights_only=False)
    with torch.no_grad():
        for n, p in model.items():
            p.copy_(cut(weights[n], p))
    optimizer.load_state_dict(state)
    loaded = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, DTensor)]
    for t in map(DTensor.to_local, loaded):
        assert t.untyped_storage().nbytes() == t.nbytes, "a shard keeps the whole tensor in memory"
    return differences(train(model, optimizer, SAVED_AT), expected[name])


def in_accelerates_order(folder, name, mesh, expected):
    """An optimizer of whole parameters, in whose groups Accelerate then puts the shards; afterwards a checkpoint."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    model = make_model()
    optimizer = OURS[name](groups_of(model))
    names = {p: n for n, p in model.items()}
    for group in optimizer.param_groups:
        group["params"] = [mock.Mock(data_ptr=names[p]) for p in group["params"]]
    fully_shard(model, mesh=mesh, ignored_params={model["whole"]})
    fsdp2_switch_optimizer_parameters(optimizer, model)
    load(folder / "one" / name, model, optimizer)
    weights = train(model, optimizer, SAVED_AT)
    assert optimizer.state.keys() == set(model.values()), "the state of the whole parameters is still there"
    return differences(weights, expected[name])


def copies(name, mesh):
    """Whether a copy of the optimizer, and its pickled state dict, go on as the original."""
    model = make_model(mesh)
    optimizer = OURS[name](groups_of(model))
    train(model, optimizer, 0, 3)
    twin = copy.deepcopy(optimizer)
    params = (p for group in optimizer.param_groups for p in group["params"])
    to_twin = dict(zip(params, (p for group in twin.param_groups for p in group["params"]), strict=True))
    own = {n: to_twin[p] for n, p in model.items()}
    other = make_model(mesh)
    other.load_state_dict(model.state_dict())
    third = OURS[name](groups_of(other))
    if name == "soap":  # as torchtitan does
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        state = get_optimizer_state_dict(model, optimizer, options=flat)
        set_optimizer_state_dict(other, third, copy.deepcopy(state), options=flat)
    else:
        third.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    expected = train(model, optimizer, 3)
    return differences(train(own, twin, 3), expected) | differences(train(other, third, 3), expected)


def scaled(mesh, expected):
    """Steps by a GradScaler, with an overflow on one rank in the middle, which costs one step."""
    model = make_model(mesh)
    del model["whole"], model["float64"]  # torch unscales neither beside sharded float32 tensors
    groups = [{"params": [model["qkv"]], "role": "matrix", "blocks": 3}]
    for role in ("matrix", "embedding", "vector"):
        members = [p for n, p in model.items() if ROLES.get(n, "matrix") == role and n != "qkv"]
        groups.append({"params": members, "role": role})
    optimizer, scaler = OURS["mars_m"](groups), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in [0, 1, 2, 2, *range(3, STEPS)]:
        overflow = step == 2 and scaler.get_scale() == 1024.0
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        scaler.scale(torch.ones(()))
        give_as_in_the_whole_model(model, step, scaler.get_scale())
        if overflow and dist.get_rank() == 1:
            model["tall"].grad.to_local()[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    weights = {n: whole(p) for n, p in model.items()}
    return scaler.get_scale(), differences(weights, {n: x for n, x in expected.items() if n in weights})


def give_as_in_the_whole_model(model, step, scale):
    """The gradients that `give` draws for a model with all parameters."""
    all_of_them = make_model()
    give(all_of_them, step, scale)
    for n, p in model.items():
        g = all_of_them[n].grad
        p.grad = None if g is None else cut(g, p)


def simple(mesh, shard=None):
    """Four matrices in one group."""
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 8), (16, 4), (12, 20), (8, 8)]
    model = nn.ParameterList([nn.Parameter(torch.randn(s, generator=g)) for s in shapes])
    place = None if shard is None else lambda p: Shard(shard)
    return model if mesh is None else fully_shard(model, mesh=mesh, shard_placement_fn=place)


def simple_steps(model, optimizer, before_step=lambda: None, steps=5):
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p in model:
            p.grad = cut(torch.randn(p.shape, generator=g), p)
        before_step()
        optimizer.step()
    return {str(i): whole(p) for i, p in enumerate(model)}


def clipped(mesh):
    model = simple(mesh)
    return simple_steps(
        model, OURS["mars_m"](model.parameters()), lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    )


def scheduled(mesh):
    model = simple(mesh)
    optimizer = OURS["normuon"](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=9, cycle_momentum=False)
    return simple_steps(model, optimizer, schedule.step)


def by_columns(name, mesh):
    """Sharded along the second dimension, against whole tensors."""
    found, expected = (simple_steps(m, OURS[name](m.parameters())) for m in (simple(mesh, shard=1), simple(None)))
    return differences(found, expected)


def in_bfloat16(mesh):
    model = simple(mesh)
    return simple_steps(model, Muon(model.parameters(), lr=1e-2, ns_dtype="bfloat16"), steps=1)


def compiled(mesh, name):
    """The largest difference between compiled and eager updates, both sharded."""
    torch.compile, original = (lambda function, **_: function), torch.compile  # the numbers are tensors all the same
    try:
        first, second = (
            train(model, OURS[name](groups_of(model), compiled=with_compiler))
            for model, with_compiler in ((make_model(mesh), False), (make_model(mesh), True))
        )
    finally:
        torch.compile = original
    return max((first[n] - second[n]).abs().max().item() for n in first)


class Tied(nn.Module):
    """A table that is also the output layer, and a matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.matrix = nn.Embedding(13, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.matrix(self.table(tokens)).tanh())


def tied(mesh):
    """Equal batches on all ranks, so that the mean of the gradients is that of one process."""
    models = [Tied(), fully_shard(Tied(), mesh=mesh)]
    results = []
    for model in models:
        groups = [{"params": [model.table.weight], "role": "embedding"}, {"params": [model.matrix.weight]}]
        optimizer = OURS["muon"](groups)
        for step in range(4):
            batch_loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({n: whole(p) for n, p in model.named_parameters()})
        state = get_optimizer_state_dict(model, optimizer)
    return list(state["state"]), differences(results[1], results[0])


def batch_loss(model, step):
    tokens = torch.randint(0, 13, (8, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1).flatten())


def mixed_precision(mesh):
    """Forward and backward in bfloat16: the dtypes of gradients and state, and the loss before and after."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = fully_shard(Tied(), mesh=mesh, mp_policy=policy)
    optimizer, losses = Muon(model.parameters(), lr=1e-2), []
    for _ in range(4):
        loss = batch_loss(model, 0)
        loss.backward()
        losses.append(loss.item())
        dtypes = {p.grad.dtype for p in model.parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return dtypes | {t.dtype for s in optimizer.state.values() for t in s.values()}, losses


def after_loading_another_dtype(mesh):
    """Dtypes of the state after loading one in bfloat16."""
    model = simple(mesh)
    optimizer = Muon(model.parameters())
    state = optimizer.state_dict()
    for s in state["state"].values():
        s["momentum"] = s["momentum"].bfloat16()
    optimizer.load_state_dict(state)
    return {(t.dtype, type(t)) for s in optimizer.state.values() for t in s.values()}


def refusals(folder):
    """The messages for what cannot work, by what it is."""
    mesh, rank, x = make_mesh((2,)), dist.get_rank(), torch.ones(4, 6)
    sharded = nn.Parameter(distribute_tensor(x, mesh, (Shard(0),)))
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    views = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    bare = DTensor.from_local(x, DeviceMesh("cpu", [0, 1], _init_backend=False), (Shard(0),), run_check=False)
    strided = DTensor.from_local(x, mesh, (strided_placement(),), run_check=False, shape=(8, 6), stride=(6, 1))
    cases = dict(
        partial=lambda: Muon([nn.Parameter(DTensor.from_local(x, mesh, (Partial(),)))]),
        strided=lambda: Muon([nn.Parameter(strided)]),
        flat=lambda: Muon(flat.parameters()),
        flat_views=lambda: Muon(views.parameters()),
        process_group=lambda: Muon([sharded], process_group=dist.group.WORLD),
        bare_mesh=lambda: Muon([nn.Parameter(bare)]),
        cut_otherwise=lambda: Muon([nn.Parameter(odd_cut(mesh, rank))]),
    )
    out = {name: message_of(call) for name, call in cases.items()}
    other = Muon([nn.Parameter(torch.ones(6, 4))]).state_dict()
    replicated = Muon([nn.Parameter(distribute_tensor(x, mesh, (Replicate(),)))]).state_dict()
    optimizer = Muon([sharded])
    out["another shape"] = message_of(lambda: optimizer.load_state_dict(other))
    out["another layout"] = message_of(lambda: optimizer.load_state_dict(replicated))
    return out | unsuitable_gradients(mesh, rank)


def odd_cut(mesh, rank):
    return DTensor.from_local(torch.ones(1 + 2 * rank, 6), mesh, (Shard(0),), shape=(4, 6), stride=(6, 1))


def strided_placement():
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(0, split_factor=2)


def unsuitable_gradients(mesh, rank):
    """Messages for gradients that only some ranks have, or that are sums not yet finished; nothing may change."""
    out = {}
    for kind in ("disagreement", "partial gradient"):
        model = simple(mesh)
        optimizer = OURS["mars_m"](model.parameters())
        simple_steps(model, optimizer, steps=2)
        before = copy.deepcopy(optimizer.state_dict()["state"]), {n: whole(p) for n, p in enumerate(model)}
        if kind == "disagreement":
            model[1].grad = None if rank else model[1].grad
        else:
            model[1].grad = DTensor.from_local(torch.ones(16, 4), mesh, (Partial(),))
        message = message_of(optimizer.step)
        state = optimizer.state_dict()["state"]
        same = all(torch.equal(whole(t), whole(before[0][i][key])) for i, s in state.items() for key, t in s.items())
        out[kind] = message, same and not differences({n: whole(p) for n, p in enumerate(model)}, before[1])
    return out


def page(folder):
    """Run the loop of the page; returns its last loss and its optimizer's class."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/sharded.md").read_text(), re.DOTALL)[1]
    sys.modules["mars_optimizers"] = optimizers
    exec(compile(code, "docs/sharded.md", "exec"), names := {})
    return names["loss"].item(), type(names["optimizer"]).__name__, len(code.replace("\n\n", "\n").splitlines())


# ---- what the tests read


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports of 4 and of 2 processes, and the folder of the checkpoints."""
    folder = made_once(tmp_path_factory, "sharded", make_reports)
    found = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("four", "two", "expected")}
    return {4: found["four"], 2: found["two"], "folder": folder, "expected": found["expected"]}


def make_reports(folder):
    expected = {}
    torch.set_num_threads(1)
    for name, make in EVERY.items():
        model = make_model()
        optimizer = make(groups_of(model))
        train(model, optimizer, 0, SAVED_AT)
        if name in KEPT:
            save_alone(folder, name, model, optimizer)
        expected[name] = train(model, optimizer, SAVED_AT)
    torch.save(expected, folder / "expected.pt")
    on_ranks(4, four, folder)
    on_ranks(2, two, folder)


def save_alone(folder, name, model, optimizer):
    saved = dict(weights=model.state_dict(), state=get_optimizer_state_dict(model, optimizer))
    dcp.save(saved, checkpoint_id=folder / "one" / name, no_dist=True)
    torch.save(copy.deepcopy((model.state_dict(), optimizer.state_dict())), folder / f"{name}.pt")


CASES = [(name, ranks, shape) for ranks, shapes in MESHES.items() for shape in shapes for name in EVERY]


@pytest.mark.parametrize("name, ranks, shape", CASES)
def test_with_equal_gradients_every_optimizer_is_the_unsharded_one_bit_for_bit(reports, name, ranks, shape):
    """But for the last elements of what torch's fused Adam updates, and the clip factors of float64."""
    report = reports[ranks]["equal"][name, shape]
    exact = {n: d for n, d in report["different"].items() if n not in report["fused"] and n != "float64"}
    assert exact == {}
    assert all(d <= 1e-7 for d in report["different"].values())
    assert report["different"].get("float64", 0) <= 1e-15


@pytest.mark.parametrize("name, ranks, shape", CASES)
def test_state_before_the_first_step_is_that_after_it_and_sharded_as_the_weight(reports, name, ranks, shape):
    assert reports[ranks]["equal"][name, shape]["same_layout"]


@pytest.mark.parametrize("name, ranks, shape", CASES)
def test_a_step_makes_two_exchanges_for_each_family_of_matrices_and_one_sum(reports, name, ranks, shape):
    """Counted by torch. Where nothing is divided, nothing is sent. torch's AdamW has nothing to agree on."""
    calls = reports[ranks]["equal"][name, shape]["calls"]
    alone = shape[-1] == 1
    has_matrices = OURS.get(name) and "matrix" in exchanged(name)
    expected = {} if alone or name == "adamw" else {"allreduce_": 1}
    families = FAMILIES + 2 * (name == "soap")  # which counts steps: "late" has taken two less, "wide" one
    assert calls == (expected | {"alltoall_base_": 2 * families} if has_matrices and not alone else expected)


def exchanged(name):
    """Roles whose directions need whole matrices."""
    optimizer = OURS[name]([nn.Parameter(torch.ones(2, 2))])
    group = optimizer.param_groups[0]
    return {role for role in ("matrix", "vector") if isinstance(optimizer.rule(group, role).direction, MatrixDirection)}


def test_a_rank_sends_each_matrix_element_twice_divided_by_the_ranks(reports):
    """In bfloat16, two bytes each: 8 matrices (16, 32) over 4 ranks."""
    assert reports[4]["bytes"] == 2 * (8 * 16 * 32) * 2 / 4


def test_under_hsdp_only_ranks_that_share_one_copy_talk(reports):
    """On a mesh (2, 2): neither all ranks together, nor the replicas, and nobody gathers whole weights."""
    assert reports[4]["group sizes"] == {("all_to_all_single", 2), ("all_reduce", 2)}


@pytest.mark.parametrize("name", OURS)
def test_state_is_divided_by_the_number_of_ranks(reports, name):
    whole_state, held = reports[4]["state"][name]
    assert sum(held) == whole_state
    assert max(held) <= 1.05 * whole_state / 4


@pytest.mark.parametrize("size", ["medium", "xl"])
def test_eight_ranks_share_the_work_on_matrices_evenly(size):
    """The largest share of Newton-Schulz's operations on 355M and 1558M parameters, relative to the mean."""
    with torch.device("meta"):
        model = GPT(load_config(ROOT / "config" / f"gpt2_{size}.py", []).model)
    matrices, owners = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n], Owners(0, 8)
    work = Orthogonal(summed(0.95)).cost
    owners.assign(families(matrices, 1), lambda p: work(*p.shape))
    shares = [sum(work(*p.shape) for p in matrices if owners.owner[p] == rank) for rank in range(8)]
    assert max(shares) * 8 <= 1.10 * sum(shares)


def test_checkpoints_of_torch_move_between_four_two_and_one_process_and_ddp(reports):
    """Through torch's state dicts and straight into the tensors. The rest of the run is equal bit for bit."""
    loaded = reports[2]["loaded"] | reports[4]["loaded"]
    assert len(loaded) == len(KEPT) * 10
    for (way, name, function), different in loaded.items():
        assert exact(name, different) == {}, (way, name, function)


@pytest.mark.parametrize("source, start", [("two", SAVED_AT + 1), ("ddp", SAVED_AT)])
@pytest.mark.parametrize("name", KEPT)
def test_one_process_goes_on_where_two_stopped(reports, name, source, start):
    model = make_model()
    optimizer = OURS[name](groups_of(model))
    load(reports["folder"] / source / name, model, optimizer, no_dist=True)
    assert exact(name, differences(train(model, optimizer, start), reports["expected"][name])) == {}


def exact(name, different):
    """What differs though it should not, or by more than the last elements of torch's fused kernel may."""
    model = make_model()
    near = fused(EVERY[name](groups_of(model)), model)
    return {n: d for n, d in different.items() if n not in near or d > 1e-7}


@pytest.mark.parametrize("name", KEPT)
def test_a_copy_and_a_pickled_or_flattened_state_dict_go_on_as_the_original(reports, name):
    assert reports[2]["copies"][name] == {}


def test_a_gradscaler_leaves_out_a_step_with_an_overflow_on_one_rank(reports):
    scale, different = reports[2]["scaler"]
    assert scale == 512.0
    assert exact("mars_m", different) == {}


@pytest.mark.parametrize("what, atol", [("clip_grad_norm", 1e-6), ("schedule", 0.0)])
def test_torchs_clipping_and_schedules_work(reports, what, atol):
    """torch adds up a global norm in another order on shards, so its last bit may differ."""
    sharded, alone = reports[2][what]
    for n, x in alone.items():
        torch.testing.assert_close(sharded[n], x, atol=atol, rtol=0)


def test_a_tied_embedding_is_one_parameter(reports):
    names, different = reports[2]["tied"]
    assert names == ["table.weight", "matrix.weight"]
    assert all(d < 1e-6 for d in different.values())


def test_with_mixed_precision_gradients_and_state_have_the_dtype_of_the_weights(reports):
    dtypes, losses = reports[2]["mixed"]
    assert dtypes == {torch.float32}
    assert losses[-1] < losses[0]


def test_a_state_of_another_dtype_gets_that_of_the_weights(reports):
    assert reports[2]["dtype"] == {(torch.float32, DTensor)}


def test_matrices_sharded_by_columns_are_whole_for_their_owner_too(reports):
    """A clip factor is the sum of parts of rows here, so its last bit may differ."""
    assert reports[2]["columns"]["muon"] == {}
    assert all(d < 1e-6 for d in reports[2]["columns"]["mars_m"].values())


def test_in_bfloat16_inputs_are_rounded_before_they_travel(reports):
    """So the update differs from the unsharded one by rounding of bfloat16, and not more. Its size is lr / 5."""
    sharded, alone = reports[2]["bfloat16"]
    for n, x in alone.items():
        torch.testing.assert_close(sharded[n], x, atol=2e-4, rtol=0)


def test_compiled_updates_agree(reports):
    assert max(reports[2]["compiled"]) < 1e-6


@pytest.mark.parametrize(
    "what, message",
    [
        ("partial", r"placements \(Partial\(sum\),\), is a sum that is not finished; redistribute it"),
        ("strided", "is sharded in strides, .*; use fully_shard alone"),
        ("flat", r"shape \(10,\) was flattened by FullyShardedDataParallel; use fully_shard instead"),
        ("flat_views", "was flattened by FullyShardedDataParallel; use fully_shard instead"),
        ("process_group", "process_group beside a DTensor: leave it out"),
        ("bare_mesh", "has a mesh without process groups; make it by init_device_mesh"),
        ("cut_otherwise", r"has a shard of shape \(1, 6\) here; cut it as fully_shard"),
        ("another shape", r"momentum of parameter 0 has another shape than \(4, 6\)"),
        ("another layout", "is sharded in another way than the parameter; load it by torch.distributed.checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(reports, what, message):
    said = reports[2]["refused"][what]
    assert re.search(message, said)
    assert "\n" not in said


def test_two_sharded_dimensions_and_two_meshes_are_refused(reports):
    assert "is sharded over two dimensions of its mesh; shard over one" in reports[4]["two dimensions"]
    assert "is sharded over another mesh than the parameters before it; give each mesh" in reports[4]["two meshes"]


@pytest.mark.parametrize(
    "what, message",
    [
        ("disagreement", "1 of 2 ranks have a gradient; all or none must, so give the others one of zeros"),
        ("partial gradient", r"has placements \(Partial\(sum\),\), not \(Shard\(dim=0\),\): redistribute it first"),
    ],
)
def test_unsuitable_gradients_are_refused_and_nothing_is_changed(reports, what, message):
    said, unchanged = reports[2]["refused"][what]
    assert re.search(message, said)
    assert unchanged


def test_the_loop_of_the_page_learns_on_two_processes(tmp_path):
    loss, optimizer, lines = on_ranks(2, page, tmp_path)
    assert loss < 0.5  # ln 100 at the start
    assert optimizer == "MARSM"
    assert lines <= 25
