"""The optimizers as ordinary optimizers of torch: state, copies, closures, schedulers, compilation, late gradients."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint
from optimizer_cases import (
    APPROXIMATE,
    EVERY,
    SHAPES,
    approximate,
    every,
    gradients,
    parameters,
    run,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optimizers import (
    MARS,
    MARSM,
    Lion,
    MARSConfig,
    Muon,
    build_optimizer,
)
from optimizers.state import state_bytes

# ---- being an ordinary optimizer


@every
def test_state_dict_round_trip_continues_bit_for_bit(make):
    params = parameters(dtype=torch.float32)
    optimizer, grads = make(params.values()), gradients(params, 8)
    run(optimizer, params, grads[:4])
    twin = copy.deepcopy(params)
    other = make(twin.values())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, grads[4:])
    run(other, twin, grads[4:])
    for n in params:
        assert torch.equal(params[n], twin[n])


def test_hooks_of_torch_around_saving_and_loading_are_called_as_torch_calls_them():
    params = parameters(dtype=torch.float32)
    optimizer = MARS(params.values())
    run(optimizer, params, gradients(params, 3))
    calls = []

    def after_saving(_, state):
        calls.append("saved")
        return {"inner": state, "state": {}, "param_groups": []}

    def before_loading(_, state):
        calls.append("unwrapped")
        return state["inner"]

    def after_loading(loaded):
        calls.append(f"loaded step {int(loaded.state[params['gain']]['step'])}")

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(after_loading)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saving", "saved", "unwrapped", "loaded step 3"]


@every
def test_a_pickled_copy_takes_its_own_state_dict_back(make):
    params = parameters(dtype=torch.float32)
    optimizer = make(list(params.values()))
    run(optimizer, params, gradients(params, 3))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.load_state_dict(twin.state_dict())
        own = dict(zip(params, (p for g in twin.param_groups for p in g["params"]), strict=True))
        reference = copy.deepcopy(params)
        other = make(list(reference.values()))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(twin, own, gradients(params, 3, seed=5))
        run(other, reference, gradients(params, 3, seed=5))
        assert all(torch.equal(own[n], reference[n]) for n in params)


@every
def test_the_state_dicts_of_torchs_distributed_checkpoints_come_back(make):
    """They name parameters instead of numbering them."""
    params = nn.ParameterDict(parameters(dtype=torch.float32))
    optimizer = make(list(params.parameters()))
    run(optimizer, dict(params), gradients(params, 3))
    saved = copy.deepcopy(get_optimizer_state_dict(params, optimizer))
    weights = copy.deepcopy(params)
    run(optimizer, dict(params), gradients(params, 2, seed=5))
    other = make(list(weights.parameters()))
    set_optimizer_state_dict(weights, other, saved)
    run(other, dict(weights), gradients(params, 2, seed=5))
    assert all(torch.equal(params[n], weights[n]) for n in params)


@every
def test_frozen_and_empty_parameters_pass_torchs_distributed_state_dicts(make):
    """As with torch's AdamW. The frozen one is trained later, from then on."""
    params = nn.ParameterDict(parameters(dtype=torch.float32, shapes=SHAPES | {"empty": (0, 4)}))
    params["square"].requires_grad = False
    twin = copy.deepcopy(params)
    one, two = make(list(params.parameters())), make(list(twin.parameters()))

    def trained(own):
        return {n: p for n, p in own.items() if p.requires_grad}

    run(one, trained(params), gradients(trained(params), 3))
    set_optimizer_state_dict(twin, two, copy.deepcopy(get_optimizer_state_dict(params, one)))
    twin.load_state_dict(params.state_dict())
    for optimizer, own in ((one, params), (two, twin)):
        own["square"].requires_grad = True
        run(optimizer, dict(own), gradients(own, 3, seed=5))
    assert all(torch.equal(params[n], twin[n]) for n in params)


def test_a_distributed_checkpoint_loads_in_place_with_a_count_for_each_parameter(tmp_path):
    """dcp.load writes into the tensors of the state that it is given, so no two parameters may share one."""
    params = parameters(dtype=torch.float32, shapes={"early": (16,), "late": (16,)})
    optimizer = MARS(params.values())
    for t in range(10):
        params["early"].grad = torch.ones(16)
        params["late"].grad = torch.ones(16) if t >= 8 else None
        optimizer.step()
    saved = optimizer.state_dict()["state"]
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    fresh = MARS(parameters(dtype=torch.float32, shapes={"early": (16,), "late": (16,)}).values())
    torch.distributed.checkpoint.load(fresh.state_dict()["state"], checkpoint_id=tmp_path, no_dist=True)
    assert [float(s["step"]) for s in fresh.state.values()] == [10, 2]


@every
def test_state_is_complete_before_the_first_step(make):
    params = parameters(dtype=torch.float32)
    optimizer = make(params.values())
    before = {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    run(optimizer, params, gradients(params, 2))
    assert before == {i: set(s) for i, s in optimizer.state_dict()["state"].items()}
    assert len(before) == len(params)


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
                group["weight_decay"] = 0.02 * (5 - t)  # 0 at the end
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
def test_a_model_may_be_converted_after_its_optimizer_was_made(make):
    """The state then has the dtype that it would have had from the start."""
    model = nn.ParameterDict(parameters(dtype=torch.float32))
    grads = gradients(model, 4)
    optimizer = make(model.values())
    run(optimizer, dict(model), grads[:2])
    state = copy.deepcopy(optimizer.state_dict())
    model.double()
    wide = copy.deepcopy(model)
    reference = make(wide.values())
    reference.load_state_dict(state)  # torch converts on loading
    doubled = [{n: g.double() for n, g in step.items()} for step in grads[2:]]
    run(optimizer, dict(model), doubled)
    run(reference, dict(wide), doubled)
    for n, p in model.items():
        assert p.dtype == torch.float64
        assert torch.equal(p, wide[n])
    model.bfloat16()
    for p in model.values():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="dtype torch.bfloat16: must be float32 or float64"):
        optimizer.step()


@approximate
def test_code_that_the_compiler_gives_up_on_still_computes_the_same(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plain, compiled = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    grads = gradients(plain, 4)
    run(make(plain.values()), plain, grads)
    run(make(compiled.values(), compiled=True), compiled, grads)
    for n in plain:
        torch.testing.assert_close(plain[n], compiled[n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "make, per_parameter",
    [
        (lambda p: MARS([p]), 12),
        (lambda p: MARS([p], amsgrad=True), 16),
        (lambda p: MARS([p], mars_type="mars-lion"), 8),
        (lambda p: MARS([p], mars_type="mars-shampoo"), 8),
        (lambda p: MARSM([p]), 8),
        (lambda p: MARSM([p], is_approx=False), 12),
        (lambda p: MARSM([p], clip_c=False), 4),
        (lambda p: Muon([p]), 4),
        (lambda p: Lion([p]), 4),
    ],
)
def test_state_bytes_per_parameter(make, per_parameter):
    p = nn.Parameter(torch.zeros(32, 64))
    optimizer = make(p)
    assert state_bytes(optimizer) == per_parameter * p.numel()
    p.grad = torch.ones_like(p)
    optimizer.update_previous_grad()
    optimizer.step()
    assert state_bytes(optimizer) == per_parameter * p.numel()


def test_keys_of_torchs_schedulers_stay_in_the_groups():
    optimizer = Muon([nn.Parameter(torch.ones(4, 4))])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert "max_momentum" in group
    optimizer.add_param_group(group | {"params": [nn.Parameter(torch.ones(4, 4))]})
