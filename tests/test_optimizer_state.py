"""State of optimizers: saved, loaded, copied, converted, and that of others refused."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint
from optimizer_steps import SHAPES, every, gradients, parameters, run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optimizers import MARS, MARSM, Lion, Muon
from optimizers.state import state_bytes


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


# ---- state of another optimizer


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
