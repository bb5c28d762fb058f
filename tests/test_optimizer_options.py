"""Options that change a rule: coefficients of Newton-Schulz, cautious weight decay, each against numpy in float64."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from optimizer_cases import EVERY, gradients, parameters, run
from torch import nn

from config.load import ConfigError, load_config, saved_config, to_dict
from model import GPT, GPTConfig
from optimizers import MARS, MARSM, OPTIMIZERS, Lion, Muon, MuonConfig, NorMuon, Shampoo, build_optimizer
from optimizers.newton_schulz import BEST_QUINTICS, QUINTIC, coefficient_errors, orthogonalize, triples_of
from optimizers.roles import update_table
from runtime.files import write_json

# ---- coefficients of Newton-Schulz

CUBIC = ((1.5, -0.5, 0.0),)  # Newton's own iteration for the polar factor


def steps_of_paper(coefficients, steps):
    """The coefficients of each step, and what the paper multiplies the norm with before the first one."""
    if coefficients == "quintic":
        return [QUINTIC] * steps, 1.0
    if coefficients != "polar_express":
        return [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)], 1.0
    safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in BEST_QUINTICS[:-1]] + [BEST_QUINTICS[-1]]
    return (safe + [BEST_QUINTICS[-1]] * steps)[:steps], 1.01


def iterated(G, coefficients, steps=5):
    """X <- a X + b X X^T X + c (X X^T)^2 X in float64, as the papers write it."""
    triples, factor = steps_of_paper(coefficients, steps)
    X = np.asarray(G, dtype=np.float64)
    X = X / (np.linalg.norm(X) * factor)
    for a, b, c in triples:
        once = X @ X.T @ X
        X = a * X + b * once + c * X @ X.T @ once
    return X


def polar_factor(G):
    U, _, Vh = np.linalg.svd(np.asarray(G, dtype=np.float64), full_matrices=False)
    return U @ Vh


def matrix(shape, smallest, seed=0):
    """A matrix with singular values from 1 down to `smallest`, equally far apart in their logarithm."""
    g = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=g, dtype=torch.float64), full_matrices=False)
    return U @ torch.diag(torch.logspace(0, math.log10(smallest), min(shape), dtype=torch.float64)) @ Vh


@pytest.mark.parametrize("steps", [2, 5, 12])
@pytest.mark.parametrize("shape", [(40, 48), (24, 96), (96, 24), (16, 16)])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", CUBIC, ((3.0, -4.0, 1.9), (2.0, -1.5, 0.5))])
def test_the_iteration_is_that_of_numpy_in_float64(coefficients, shape, steps):
    G = matrix(shape, 1e-3)
    found = orthogonalize(G.float()[None], 0.0, torch.float32, triples_of(coefficients, steps))[0]
    expected = iterated(G, coefficients, steps)
    assert np.linalg.norm(found.double().numpy() - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("smallest", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("steps", [5, 7])
def test_polar_express_is_closer_to_the_polar_factor_than_the_quintic(smallest, steps):
    G = matrix((48, 96), smallest)
    exact = polar_factor(G)

    def error(coefficients, dtype=torch.float32):
        found = orthogonalize(G.float()[None], dtype=dtype, triples=triples_of(coefficients, steps))[0]
        return np.linalg.norm(found.double().numpy() - exact) / np.linalg.norm(exact)

    assert error("polar_express") < error("quintic")
    assert error("polar_express", torch.bfloat16) < error("quintic", torch.bfloat16)


def test_eight_steps_of_polar_express_reach_the_polar_factor():
    G = matrix((32, 64), 0.05)
    found = orthogonalize(G.float()[None], dtype=torch.float32, triples=triples_of("polar_express", 8))[0]
    np.testing.assert_allclose(found.numpy(), polar_factor(G), atol=1e-5)


def test_each_step_of_polar_express_is_the_best_quintic_for_its_interval():
    """On an interval, the odd quintic nearest to 1 has an error of equal size and alternating sign at four points.

    They are both ends and the two extremes between them (Chebyshev). The paper lets no interval begin below 0.024 times
    its end, and then scales the step so that its values lie around 1 evenly. The list is that before the safety factor.
    """
    low, high = 1e-3, 1.0
    for a, b, c in BEST_QUINTICS:
        p = np.polynomial.Polynomial([0, a, 0, b, 0, c])
        maximum, minimum = sorted(x for x in p.deriv().roots().real if x > 0)
        np.testing.assert_allclose(p(max(low, 0.02407327424182761 * high)), p(minimum), rtol=1e-9)
        np.testing.assert_allclose(p(high), p(maximum), rtol=1e-9)
        np.testing.assert_allclose(p(low) + p(high), 2, rtol=1e-9)
        low, high = p(low), p(high)
    assert high - low < 1e-12


def matrix_update(make, G, **settings):
    """The first update of a zero matrix at unit learning rate."""
    p = nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    make([{"params": [p], "role": "matrix"}], lr=1.0, **settings).step()
    return -p.detach().double().numpy()


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", CUBIC, [list(CUBIC[0])]])
@pytest.mark.parametrize("shape", [(24, 16), (16, 40)])
def test_every_optimizer_that_orthogonalizes_follows_its_coefficients(shape, coefficients):
    """The first momentum is a multiple of the gradient, so the update is the iteration from the gradient, scaled."""
    G, (rows, columns) = matrix(shape, 1e-2), shape
    direction = iterated(G, coefficients)
    moonlight, original = 0.2 * math.sqrt(max(shape)), math.sqrt(max(1, rows / columns))
    neurons = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    expected = {
        Muon: moonlight * direction,
        MARSM: moonlight * direction,
        NorMuon: 0.2 * math.sqrt(columns) * neurons,
        Shampoo: original * direction,
        partial(MARS, mars_type="mars-shampoo"): original * direction,
    }
    for make, update in expected.items():
        found = matrix_update(make, G, coefficients=coefficients)
        np.testing.assert_allclose(found, update, atol=1e-4 * np.abs(update).max(), err_msg=str(make))


WRONG = {
    "cubic": r"coefficients='cubic': must be one of quintic, polar_express, or one or more groups of 3 finite numbers",
    (): r"coefficients=\(\): must be one of",
    (1.5, -0.5, 0.0): r"coefficients=\(1.5, -0.5, 0.0\): must be one of",
    ((1.5, -0.5),): r"coefficients=\(\(1.5, -0.5\),\): must be one of",
    ((1.5, math.nan, 0.0),): r"coefficients=\(\(1.5, nan, 0.0\),\): must be .* finite numbers",
    CUBIC * 6: r"coefficients: has 6 groups \(a, b, c\) for 5 steps; give at most 5",
    (
        (3.0, 0.0, 0.0),
    ): r"value 1 becomes 3 in step 1; each step must keep all values of \(0, 1\] positive and at most 2",
    ((1.9, 0.0, 0.0),): r"the singular value 1 becomes 3.61 in step 2",
    ((1.0, -5.0, 5.0),): r"becomes -0.154 in step 3",  # 1 stays 1
    ((0.0, 0.0, 0.0),): r"the singular value 1 becomes 0 in step 1",
}


@pytest.mark.parametrize("coefficients, message", WRONG.items())
def test_bad_coefficients_are_refused_in_one_line(coefficients, message):
    for make in (Muon, MARSM, NorMuon, Shampoo, partial(MARS, mars_type="mars-shampoo")):
        with pytest.raises(ValueError, match=message) as caught:
            make([nn.Parameter(torch.zeros(4, 4))], coefficients=coefficients)
        assert "\n" not in str(caught.value)


def test_the_published_coefficients_keep_all_singular_values_bounded():
    for coefficients in ("quintic", "polar_express", CUBIC):
        for steps in (*range(1, 13), 50):
            assert coefficient_errors(coefficients, steps) == []


def test_coefficients_without_newton_schulz_are_refused():
    with pytest.raises(ValueError, match="coefficients='polar_express': needs mars_type=mars-shampoo"):
        MARS([nn.Parameter(torch.zeros(4, 4))], coefficients="polar_express")


@pytest.mark.parametrize("optimizer", ["muon", "mars_m", "normuon", "shampoo", "mars_shampoo"])
def test_coefficients_come_from_the_command_line(optimizer, tmp_path):
    command = ["tests/tiny_config.py", [f"--optimizer={optimizer}"]]

    def load(text):
        return load_config(ROOT / command[0], [*command[1], f"--coefficients={text}"])

    assert load("quintic").optim == load_config(ROOT / command[0], command[1]).optim == OPTIMIZERS[optimizer]
    assert load("polar_express").optim.coefficients == "polar_express"
    run = load("1.5,-0.5,0,2,-1.5,0.5")
    assert run.optim.coefficients == ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    assert load("[(1.5, -0.5, 0), (2, -1.5, 0.5)]").optim == run.optim
    assert run.name.endswith("-coefficients1.5_-0.5_0x2_-1.5_0.5")
    write_json(tmp_path / "config.json", to_dict(run))
    assert saved_config(tmp_path) == run
    with pytest.raises(ConfigError, match="coefficients=1,2: expected one of quintic, polar_express, or one or"):
        load("1,2")
    with pytest.raises(ConfigError, match=r"optim.coefficients='best': must be one of quintic, polar_express"):
        load("best")
    with pytest.raises(ConfigError, match=r"optim.coefficients=.*becomes 7 in step 1"):
        load("1,2,4")


# ---- cautious weight decay


def cautiously(p, u, lr, wd):
    """Algorithm 1 of arXiv 2510.12402: entries decay where update and weight have one sign, or one of them is zero."""
    return p - lr * (u + wd * (u * p >= 0) * p)


def cautious_recurrence(kind, p, grads, lr, wd):
    """A numpy array through the published equations, with cautious instead of decoupled decay."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        if kind == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        elif kind == "lion":
            u, m = np.sign(0.9 * m + 0.1 * g), 0.98 * m + 0.02 * g
        else:
            m = 0.95 * m + g
            u = 0.2 * math.sqrt(max(p.shape)) * iterated(g + 0.95 * m, "quintic")
        p = cautiously(p, u, lr, wd)
    return p


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_cautious_decay_agrees_with_its_equation(kind):
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads, settings = gradients(params, 30), dict(lr=3e-2, weight_decay=0.5, weight_decay_kind="cautious")
    make = {
        "adamw": partial(MARS, betas=(0.9, 0.95), gamma=0.0, clip_c=False, optimize_1d=True),
        "lion": partial(Lion, betas=(0.9, 0.98)),
        "muon": partial(Muon, adamw_eps_first=False),
    }[kind]
    run(make(params.values(), **settings), params, grads)
    for n, p in params.items():
        rule = "adamw" if kind == "muon" and p.dim() == 1 else kind
        expected = cautious_recurrence(rule, start[n].numpy(), [g[n].numpy() for g in grads], 3e-2, 0.5)
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=2e-5 if rule == "muon" else 1e-11)
        assert np.abs(p.detach().numpy() - start[n].numpy()).max() > 0.1


@pytest.mark.parametrize("name", [name for name in EVERY if name != "soap"])
def test_every_optimizer_decays_exactly_the_weights_that_its_update_shrinks(name):
    """The update is what moves a weight without decay; it depends on the gradients alone."""
    without = parameters()
    cautious = copy.deepcopy(without)
    has = EVERY[name].func.settings
    decays = {key: 0.5 for key in ("weight_decay", "weight_decay_1d") if hasattr(has, key)}
    first = EVERY[name](without.values(), **dict.fromkeys(decays, 0.0))
    second = EVERY[name](cautious.values(), **decays | {"weight_decay_kind": "cautious"})
    for grads in gradients(without, 8):
        before = {n: p.detach().clone().numpy() for n, p in cautious.items()}
        for n, p in without.items():
            p.data.copy_(cautious[n].data)
        run(first, without, [grads])
        run(second, cautious, [grads])
        for n, p in before.items():
            update = (p - without[n].detach().numpy()) / 1e-2
            rate = second.rule_of(second.param_groups[0], cautious[n]).lr
            expected = cautiously(p, update * (1e-2 / rate), rate, 0.5)
            np.testing.assert_allclose(cautious[n].detach().numpy(), expected, atol=1e-12)
            shrunk = (update * p >= 0).mean()
            assert 0 < shrunk < 1


def test_decoupled_decay_is_the_default_and_another_word_is_refused():
    for config in OPTIMIZERS.values():
        assert getattr(config, "weight_decay_kind", "decoupled") == "decoupled"
    with pytest.raises(ValueError, match="weight_decay_kind='timid': must be one of decoupled, cautious"):
        Muon([nn.Parameter(torch.zeros(4, 4))], weight_decay_kind="timid")
    given = ["--optimizer=lion", "--weight_decay_kind=cautious"]
    assert load_config(ROOT / "tests/tiny_config.py", given).optim.weight_decay_kind == "cautious"


def test_the_table_of_parameters_says_which_decay_is_cautious():
    model = nn.ParameterDict({"m": nn.Parameter(torch.zeros(4, 4)), "v": nn.Parameter(torch.zeros(4))})
    model.parameter_roles = lambda: {"m": "matrix", "v": "vector"}
    optimizer = build_optimizer(model, MuonConfig(weight_decay_kind="cautious"))
    rows = update_table(optimizer, {p: n for n, p in model.named_parameters()})
    assert [row[-1] for row in rows] == ["0.1 cautious", "0"]


# ---- query, key and value head by head


@pytest.mark.parametrize("optimizer", ["muon", "mars_m"])
def test_split_heads_orthogonalizes_every_head_of_query_key_and_value(optimizer):
    """The model sees the rows of c_attn as (query, key, value; head; within a head)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=32, block_size=8, vocab_size=64))
    settings = OPTIMIZERS[optimizer].changed(split_heads=4, lr=1.0, weight_decay=0.0)
    trained = build_optimizer(model, settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weights = {n: model.get_parameter(f"transformer.h.0.attn.{n}.weight") for n in ("c_attn", "c_proj")}
    grads = {n: p.grad.double().numpy() for n, p in weights.items()}
    before = {n: p.detach().double().numpy().copy() for n, p in weights.items()}
    trained.step()
    moves = {n: before[n] - p.detach().double().numpy() for n, p in weights.items()}
    scale = 0.2 * math.sqrt(32)
    parts = zip(*(x["c_attn"].reshape(3, 4, 8, 32) for x in (moves, grads)), strict=True)
    for move, gradient in ((a, b) for many in parts for a, b in zip(*many, strict=True)):
        np.testing.assert_allclose(move, scale * iterated(gradient, "quintic"), atol=1e-4)
    np.testing.assert_allclose(moves["c_proj"], scale * iterated(grads["c_proj"], "quintic"), atol=1e-4)


def test_heads_that_the_model_does_not_have_are_refused_in_one_line():
    given = ["--optimizer=mars_m", "--n_head=2", "--n_embd=16"]
    assert load_config(ROOT / "tests/tiny_config.py", [*given, "--split_heads=2"]).optim.split_heads == 2
    for heads in (3, 4, 5):
        with pytest.raises(ConfigError) as caught:
            load_config(ROOT / "tests/tiny_config.py", [*given, f"--split_heads={heads}"])
        assert str(caught.value) == f"config: optim.split_heads={heads}: must be n_head=2, the model's heads, or 0"
    with pytest.raises(ConfigError, match="split_heads=2: splits query, key and value already; leave out split_qkv"):
        load_config(ROOT / "tests/tiny_config.py", [*given, "--split_heads=2", "--split_qkv=true"])
