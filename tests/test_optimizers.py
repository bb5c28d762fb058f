"""The optimizers as users meet them: steps, compilation, bad input, the registry, and which tensor gets which rule."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from optimizer_steps import APPROXIMATE, EVERY, SHAPES, approximate, every, gradients, parameters, run
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

# ---- being an ordinary optimizer


@every
def test_both_styles_of_zero_grad_give_the_same_weights(make):
    results = []
    for set_to_none in (True, False):
        params = parameters(dtype=torch.float32)
        optimizer = make(params.values())
        for grads in gradients(params, 6):
            optimizer.update_previous_grad()
            for n, p in params.items():
                if p.grad is None:
                    p.grad = grads[n].clone()
                else:
                    p.grad += grads[n]
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append(params)
    for n in results[0]:
        assert torch.equal(results[0][n], results[1][n])


@approximate
def test_a_step_that_a_gradscaler_leaves_out_changes_nothing(make):
    """torch's own path: gradients are unscaled, and steps with an overflow left out, here one in the middle."""
    clean, params = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    reference, optimizer = make(clean.values()), make(params.values())
    scaler, grads = torch.amp.GradScaler("cpu", init_scale=1024.0), gradients(params, 6)
    run(reference, clean, grads)
    for t, step in enumerate([*grads[:3], grads[3], *grads[3:]]):
        for n, p in params.items():
            p.grad = step[n] * scaler.scale(torch.ones(()))
            if t == 3 and n == "tall":
                p.grad[3, 2] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    for n in params:
        assert torch.equal(params[n], clean[n]), n


@every
def test_parameters_without_gradient_and_frozen_ones_are_left_alone(make):
    params = parameters(dtype=torch.float32)
    params["square"].requires_grad = False
    optimizer, before = make(params.values()), {n: p.detach().clone() for n, p in params.items()}
    for n in ("wide", "gain"):
        params[n].grad = torch.ones_like(params[n])
    for _ in range(2):  # SOAP's first step moves no matrix
        optimizer.update_previous_grad()
        optimizer.step()
        optimizer.update_last_grad()
    for n, p in params.items():
        assert torch.equal(p, before[n]) == (n in ("tall", "square"))
    optimizer.zero_grad()
    optimizer.update_previous_grad()
    optimizer.step()  # nothing has a gradient


@pytest.mark.parametrize("compiled", [False, True])
@every
def test_a_parameter_that_gets_its_first_gradient_late_moves_as_under_an_optimizer_of_its_own(
    make, compiled, monkeypatch
):
    """As in fine-tuning that unfreezes layers, and with experts. Steps without a gradient do not count."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    shapes = {f"{n}_{when}": shape for n, shape in SHAPES.items() for when in ("early", "late")}
    params = parameters(dtype=torch.float32, shapes=shapes)
    late = copy.deepcopy({n: p for n, p in params.items() if n.endswith("late")})
    together, alone = make(params.values(), compiled=compiled), make(late.values(), compiled=compiled)
    for t, grads in enumerate(gradients(params, 9)):
        for optimizer, own in ((together, params), (alone, late)):
            for n, p in own.items():
                p.grad = None if n in late and t in (0, 1, 2, 5) else grads[n].clone()
            optimizer.update_previous_grad()
            optimizer.step()
            optimizer.update_last_grad()
    for n, p in late.items():
        assert torch.equal(params[n], p), n


def test_the_late_first_step_of_mars_without_correction_is_that_of_torchs_adamw():
    params = parameters(shapes={"early": (4, 6), "late": (4, 6)})
    twins = copy.deepcopy(params)
    ours = MARS(params.values(), lr=1e-2, betas=(0.9, 0.99), gamma=0.0, clip_c=False, weight_decay=0.1)
    torchs = torch.optim.AdamW(twins.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for t, grads in enumerate(gradients(params, 302)):
        for own in (params, twins):
            own["early"].grad, own["late"].grad = grads["early"].clone(), grads["late"].clone() if t >= 300 else None
        ours.step()
        torchs.step()
    for n in params:
        torch.testing.assert_close(params[n], twins[n])


@pytest.mark.parametrize("make", [EVERY["mars-exact"], lambda p: MARSM(p, lr=1e-2, is_approx=False)])
def test_in_the_exact_form_a_parameter_without_a_next_gradient_keeps_the_previous_one(make):
    params = parameters(dtype=torch.float32)
    optimizer, grads = make(params.values()), gradients(params, 3)
    run(optimizer, params, grads[:1])
    kept = optimizer.state[params["tall"]]["previous"].clone()
    assert torch.equal(kept, grads[0]["tall"])
    for n, p in params.items():
        p.grad = None if n == "tall" else grads[1][n].clone()
    optimizer.update_previous_grad()
    for n, p in params.items():
        p.grad = grads[2][n].clone()
    optimizer.step()
    optimizer.update_last_grad()
    assert torch.equal(optimizer.state[params["tall"]]["previous"], kept)
    assert torch.equal(optimizer.state[params["wide"]]["previous"], grads[1]["wide"])


@every
def test_closures_schedulers_and_step_hooks_work(make):
    params = parameters(dtype=torch.float32)
    optimizer = make(params.values())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)

    def closure():
        optimizer.zero_grad()
        optimizer.update_previous_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    before = {n: p.detach().clone() for n, p in params.items()}
    first = optimizer.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in params.items())  # at learning rate 0 no weight moves
    scheduler.step()
    optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert not any(torch.equal(p, before[n]) for n, p in params.items())


def test_a_loop_written_for_the_official_class_runs_unchanged():
    """The documented use of the official MARS; set_to_none changes nothing."""
    results = []
    for set_to_none in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        x = torch.randn(64, 4)
        y = x.sum(dim=1, keepdim=True)
        optimizer = MARS(
            model.parameters(), lr=1e-2, betas=(0.95, 0.99), gamma=0.025, is_approx=True, mars_type="mars-adamw"
        )
        losses = []
        for _ in range(60):
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            optimizer.step(bs=64)
            optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.update_last_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        results.append(losses)
    assert results[0] == results[1]


def test_a_group_may_set_every_number_for_itself():
    params = parameters(dtype=torch.float32)
    alone = copy.deepcopy(params)
    special = dict(lr=0.02, gamma=0.2, betas=(0.8, 0.9), mars_type="mars-lion", optimize_1d=True)
    together = MARS([{"params": [params["wide"]], **special}, {"params": [params["tall"]]}], lr=1e-3)
    grads = gradients(params, 5)
    run(together, params, grads)
    run(MARS([alone["wide"]], **special), alone, grads)
    assert torch.equal(params["wide"], alone["wide"])
    assert not torch.equal(params["tall"], alone["tall"])


def test_a_learning_rate_may_be_a_tensor():
    one, two = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    grads = gradients(one, 2)
    run(MARSM(one.values(), lr=0.125), one, grads)
    run(MARSM(two.values(), lr=torch.tensor(0.125)), two, grads)
    for n in one:
        assert torch.equal(one[n], two[n])


def test_any_number_may_be_a_tensor_even_inside_betas():
    one, two = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    numbers = dict(lr=0.125, weight_decay=0.5, gamma=0.25, lr_1d=0.0625, betas=(0.75, 0.875))
    tensors = {k: tuple(map(torch.tensor, v)) if k == "betas" else torch.tensor(v) for k, v in numbers.items()}
    plain, given = MARS(one.values(), **numbers), MARS(two.values(), **tensors)
    for t, grads in enumerate(gradients(one, 3)):
        plain.param_groups[0]["lr"] = 0.125 / (t + 1)
        given.param_groups[0]["lr"].fill_(0.125 / (t + 1))  # as torch's schedulers change a tensor
        run(plain, one, [grads])
        run(given, two, [grads])
    for n in one:
        assert torch.equal(one[n], two[n])


def test_groups_can_serve_another_optimizer():
    groups = [{"params": list(parameters().values())}]
    MARSM(groups, lr=1e-3)
    second = MARSM(groups, lr=6e-3, is_approx=False).param_groups[0]
    assert (second["lr"], second["is_approx"]) == (6e-3, False)


def test_a_groups_own_learning_rate_reaches_its_vectors():
    """As in the official class: lr_1d relates to the constructor's lr, and a group's lr scales it."""
    own, given = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    vector = next(n for n, p in own.items() if p.dim() == 1)
    grads = gradients(own, 3)
    run(MARS([{"params": list(own.values()), "lr": 0.01}], lr=0.04, lr_1d=0.02), own, grads)
    run(MARS(given.values(), lr=0.01, lr_1d=0.005), given, grads)
    assert torch.equal(own[vector], given[vector])


@every
def test_empty_parameters_are_nothing_to_do(make):
    params = {"empty": nn.Parameter(torch.zeros(0, 4)), "full": nn.Parameter(torch.ones(4, 4))}
    run(make(params.values()), params, gradients(params, 2))
    assert not torch.equal(params["full"], torch.ones(4, 4))


# ---- compilation


# the compiler's own kernels for three; for the others only what it captures, which takes a tenth of the time
COMPILED = [(name, "inductor" if name in ("mars", "marsm", "ademamix") else "aot_eager") for name in APPROXIMATE]


@pytest.mark.parametrize("name, backend", COMPILED)
def test_compiled_rules_agree_and_new_rates_do_not_recompile(name, backend, monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, compiled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    one, two = EVERY[name](plain.values()), EVERY[name](compiled.values(), compiled=True)
    counters.clear()
    for t, step in enumerate(gradients(plain, 6)):
        for optimizer in (one, two):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (t + 1)
                if "gamma" in group:
                    group["gamma"] = 0.02 + 0.01 * t
        run(one, plain, [step])
        run(two, compiled, [step])
        if t == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    for n in plain:
        torch.testing.assert_close(plain[n], compiled[n], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_do_not_compile_the_norms_that_all_of_them_compute(ranks, monkeypatch):
    """Compiled reductions may add in another order on another rank, and then the replicas would differ."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f.__name__) or f)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    model = torch.nn.Linear(4, 3)
    model.parameter_roles = lambda: {"weight": "matrix", "bias": "vector"}
    optimizer = build_optimizer(model, MARSConfig(), "a group", True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert compiled
    assert ("norms_of_all" in compiled) is (ranks == 1)


@approximate
def test_a_step_inside_a_function_that_the_user_compiles_computes_the_same(make):
    plain, compiled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    grads = gradients(plain, 3)
    one, two = make(plain.values()), make(compiled.values())
    step = torch.compile(lambda: two.step(), backend="eager")
    for gradient in grads:
        run(one, plain, [gradient])
        for name, p in compiled.items():
            p.grad = gradient[name].clone()
        step()
    for n in plain:
        assert torch.equal(plain[n], compiled[n])


@approximate
def test_code_that_the_compiler_gives_up_on_still_computes_the_same(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plain, compiled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    grads = gradients(plain, 4)
    run(make(plain.values()), plain, grads)
    run(make(compiled.values(), compiled=True), compiled, grads)
    for n in plain:
        torch.testing.assert_close(plain[n], compiled[n], atol=1e-6, rtol=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: MARS(p, lr=-1), "lr=-1: must be a number of at least 0"),
        (lambda p: MARS(p, gamma=float("nan")), "gamma=nan"),
        (lambda p: MARS(p, eps=0.0), "eps=0.0: must be a number above 0"),
        (lambda p: MARSM(p, adamw_eps=0.0), "adamw_eps=0.0: must be a number above 0"),
        (lambda p: MARS(p, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): must be two numbers in \[0, 1\)"),
        (lambda p: MARS(p, mars_type="mars-sgd"), "mars_type='mars-sgd': must be one of mars-adamw, mars-lion"),
        (lambda p: MARS(p, second_moment="raw", amsgrad=True), "second_moment=raw: needs mars_type=mars-adamw"),
        (lambda p: MARS(p, eps=float("inf"), weight_decay_1d=-1), "eps=inf.*weight_decay_1d=-1"),
        (lambda p: MARSM(p, momentum=1.0), "momentum=1.0: must be a number in"),
        (lambda p: MARSM(p, ns_steps=0), "ns_steps=0: must be a whole number of at least 1"),
        (lambda p: Muon(p, scale="spectral"), "scale='spectral': must be one of moonlight, original"),
        (lambda p: Muon(p, ns_dtype="float16"), "ns_dtype='float16'"),
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
