"""What the optimizers refuse, the registry, and which rule each parameter gets."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.distributed.checkpoint
from optimizer_cases import (
    every,
    gradients,
    parameters,
    run,
)
from torch import nn

from model import GPT, GPTConfig
from optimizers import (
    MARS,
    MARSM,
    OPTIMIZERS,
    AdamWConfig,
    Lion,
    MARSConfig,
    MARSMConfig,
    Muon,
    MuonConfig,
    Settings,
    build_optimizer,
    register,
)
from optimizers.roles import folded, update_table

# ---- bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: MARS(p, lr=-1), "lr=-1: must be a number of at least 0"),
        (lambda p: MARS(p, gamma=float("nan")), "gamma=nan"),
        (lambda p: MARS(p, eps=0.0), "eps=0.0: must be a number above 0"),
        (lambda p: MARSM(p, adamw_eps=0.0), "adamw_eps=0.0: must be a number above 0"),
        (lambda p: MARS(p, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): must be 2 numbers in \[0, 1\)"),
        (lambda p: MARS(p, mars_type="mars-sgd"), "mars_type='mars-sgd': must be one of mars-adamw, mars-lion"),
        (lambda p: MARS(p, second_moment="raw", amsgrad=True), "second_moment=raw: needs mars_type=mars-adamw"),
        (lambda p: MARS(p, eps=float("inf"), weight_decay_1d=-1), "eps=inf.*weight_decay_1d=-1"),
        (lambda p: MARSM(p, momentum=1.0), "momentum=1.0: must be a number in"),
        (lambda p: MARSM(p, ns_steps=0), "ns_steps=0: must be a whole number of at least 1"),
        (lambda p: Muon(p, scale="spectral"), "scale='spectral': must be one of moonlight, original"),
        (lambda p: Muon(p, ns_dtype="float8"), "ns_dtype='float8'"),
        (lambda p: Lion(p, weight_decay=None), "weight_decay=None"),
        (lambda p: Muon([{"params": list(p), "role": "head"}]), "role='head': must be one of matrix"),
        (lambda p: Muon([{"params": list(p), "role": "matrix"}]), r"shape \(16,\): has the role of a matrix"),
        (lambda p: Muon([{"params": list(p), "blocks": 0}]), "blocks=0: must be a whole number of at least 1"),
        (lambda p: MARSM(p, ns_steps=2.5), "ns_steps=2.5: must be a whole number"),
        (lambda p: MARSM(p, gamma=None, clip_c=False), "gamma=None: must be a number of at least 0"),
        (lambda p: MARSM([{"params": list(p), "rolle": "matrix"}]), "rolle='matrix': .* is role meant"),
        (lambda p: MARS([{"params": list(p), "weight_decy": 1.0}]), "weight_decy=1.0: .* is weight_decay meant"),
        (lambda p: Muon([{"params": list(p), "blocks": 5}]), r"blocks=5: does not divide the rows of shape \(6, 24\)"),
        (lambda p: MARS([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "dtype torch.complex64"),
        (lambda p: MARS([nn.Parameter(torch.zeros(2, dtype=torch.float16))]), "dtype torch.float16"),
    ],
)
def test_bad_hyperparameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(parameters(dtype=torch.float32).values())


def test_parameters_of_two_dtypes_in_a_group_are_refused():
    params = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.float64)]
    with pytest.raises(ValueError, match="must be float32 or float64, the same in the whole group"):
        MARS(params)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = MARS(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(8, 4\) is sparse: must be dense .* set sparse=False"):
        optimizer.step()


@every
def test_copies_of_an_optimizer_go_on_by_themselves(make):
    params = parameters(dtype=torch.float32)
    optimizer, grads = make(params.values()), gradients(params, 4)
    run(optimizer, params, grads[:2])
    twin_params, twin = copy.deepcopy((params, optimizer))
    run(optimizer, params, grads[2:])
    run(twin, twin_params, grads[2:])
    for n in params:
        assert torch.equal(params[n], twin_params[n])


@every
def test_empty_parameters_are_nothing_to_do(make):
    params = {"empty": nn.Parameter(torch.zeros(0, 4)), "full": nn.Parameter(torch.ones(4, 4))}
    run(make(params.values()), params, gradients(params, 2))
    assert not torch.equal(params["full"], torch.ones(4, 4))


def test_exact_mode_without_lookahead_is_an_error():
    params = parameters(dtype=torch.float32)
    for optimizer in (MARS(params.values(), is_approx=False), MARSM(params.values(), is_approx=False)):
        for p in params.values():
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"is_approx=False: call update_previous_grad\(\)"):
            optimizer.step()


def test_a_rate_that_becomes_nonsense_is_refused():
    params = parameters(dtype=torch.float32)
    optimizer = MARS(params.values())
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="MARS: lr=nan: must be a number of at least 0"):
        run(optimizer, params, gradients(params, 1))


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda p: Lion(p), "state_dict: .*expected"),
        (lambda p: MARS(p, is_approx=False), "state_dict: .*expected"),
        (lambda p: torch.optim.AdamW(p), "state_dict: .*state is that of other parameters"),
        (lambda p: MARS(list(p)[:2]), "parameter group that doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_dict_of_another_optimizer_is_refused(other, message):
    params = parameters(dtype=torch.float32)
    optimizer = MARS(params.values())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other(params.values()).state_dict())


def test_a_state_dict_with_the_same_state_of_another_optimizer_is_refused():
    matrix = [nn.Parameter(torch.zeros(3, 4))]
    lion, muon = Lion(matrix), Muon(matrix)
    assert lion.state[matrix[0]].keys() == muon.state[matrix[0]].keys()
    for one, other, key in ((lion, muon, "betas"), (muon, lion, "nesterov")):
        with pytest.raises(ValueError, match=f"state_dict: a group has no .*{key}"):
            one.load_state_dict(other.state_dict())


def test_a_state_dict_of_other_shapes_is_refused():
    one, two = MARS([nn.Parameter(torch.zeros(3, 4))]), MARS([nn.Parameter(torch.zeros(4, 3))])
    with pytest.raises(ValueError, match=r"state_dict: exp_avg of parameter 0 has another shape than \(3, 4\)"):
        one.load_state_dict(two.state_dict())


# ---- the registry


def test_a_class_with_settings_of_another_does_not_replace_it():
    class Mine(Muon):
        settings = MuonConfig

    model = nn.Linear(4, 4, bias=False)
    model.parameter_roles = lambda: {"weight": "matrix"}
    assert type(build_optimizer(model, MuonConfig())) is Muon
    with pytest.raises(ValueError, match="MuonConfig: belongs to Muon; derive other settings from it for Mine"):
        register(Mine, MuonConfig(lr=0.5))

    @dataclass(frozen=True)
    class Derived(MuonConfig):
        pass

    assert type(build_optimizer(model, Derived(lr=0.5))) is Muon
    built = build_optimizer(model, register(Mine, Derived(lr=0.5)))
    assert (type(built), built.param_groups[0]["lr"]) == (Mine, 0.5)
    assert type(build_optimizer(model, MuonConfig())) is Muon


@pytest.mark.parametrize("wrong", [MuonConfig, Muon, None])
def test_only_an_object_of_settings_is_registered(wrong):
    """With the class of the settings, a run would silently use the optimizer that they are derived from."""
    with pytest.raises(TypeError, match=r"register\(YourOptimizer, YourSettings\(\)\): .* is no object of a class"):
        register(Muon, wrong)


def test_settings_without_a_class_say_how_to_give_one():
    @dataclass(frozen=True)
    class Lonely(Settings):
        lr: float = 0.1
        weight_decay: float = 0.0

    model = nn.Linear(4, 4, bias=False)
    model.parameter_roles = lambda: {"weight": "matrix"}
    with pytest.raises(ValueError, match=r"Lonely: call register\(YourOptimizer, Lonely\(\)\) first, or define build"):
        build_optimizer(model, Lonely())


# ---- routing


class Routed(nn.Module):
    def __init__(self, roles):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(16, 4))
        self.gain, self.roles = nn.Parameter(torch.ones(4)), roles

    def parameter_roles(self):
        return self.roles


GOOD = {"weight": "matrix", "table": "embedding", "gain": "vector"}


def test_every_tensor_gets_the_rule_of_its_role():
    model = Routed(GOOD)
    for name, config in OPTIMIZERS.items():
        optimizer = build_optimizer(model, config)
        claimed = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(claimed) == sorted(map(id, model.parameters())), name
        decays = {id(p): g.get("weight_decay") for g in optimizer.param_groups for p in g["params"]}
        assert decays[id(model.weight)] == config.weight_decay
        assert decays[id(model.table)] == 0
    muon = build_optimizer(model, MuonConfig(lr=1.0, adamw_lr=0.5))
    rules = {r: muon.rule(g, r) for g in muon.param_groups for r in [g["role"]]}
    assert {r: (rule.direction.label, rule.lr) for r, rule in rules.items()} == {
        "matrix": ("orthogonal", 1.0),
        "embedding": ("adaptive", 0.5),
        "vector": ("adaptive", 0.5),
    }


def test_the_update_table_names_every_tensor_and_folds_layers():
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=64))
    names = {p: n for n, p in model.named_parameters()}
    config = MARSMConfig(lr=0.02, adamw_lr=0.01, weight_decay=0.1, split_qkv=True)
    rows = update_table(build_optimizer(model, config), names)
    assert [row[0] for row in rows] == list(names.values())
    short = folded(rows)
    rule = "MARSM: orthogonal update of the clipped, corrected gradient in 3 blocks"
    assert ("transformer.h.*.attn.c_attn.weight (3)", "48x16", rule, "0.02", "0.1") in short
    assert ("transformer.wte.weight", "64x16", "MARSM: adaptive update of the raw gradient", "0.01", "0") in short
    assert len(short) == 9
    adamw = update_table(build_optimizer(model, AdamWConfig(lr=0.5)), names)
    assert ("transformer.ln_f.weight", "16", "AdamW", "0.5", "0") in adamw


@pytest.mark.parametrize(
    "roles, message",
    [
        ({k: v for k, v in GOOD.items() if k != "gain"}, "without a role, which no rule would update: gain"),
        (GOOD | {"head": "matrix"}, "roles for parameters that do not exist: head"),
        (GOOD | {"gain": "norm"}, "unknown roles norm"),
    ],
)
def test_tensors_without_a_role_and_unknown_roles_are_errors(roles, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(Routed(roles), AdamWConfig())


def test_a_tensor_in_two_groups_is_an_error():
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        MARSM([{"params": [p], "role": "matrix"}, {"params": [p], "role": "embedding"}])


def test_frozen_parameters_need_no_role():
    model = Routed({k: v for k, v in GOOD.items() if k != "gain"})
    model.gain.requires_grad = False
    assert len(build_optimizer(model, MARSConfig()).param_groups) == 2
