"""The optimizers against recurrences, identities, torch's own classes, and bad input."""

import copy
import math
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from model import GPT, GPTConfig
from optimizers import (
    MARS,
    MARSM,
    OPTIMIZERS,
    REGISTRY,
    SOAP,
    AdamWConfig,
    AdEMAMix,
    Lion,
    MARSConfig,
    MARSMConfig,
    Muon,
    MuonConfig,
    Settings,
    build_optimizer,
    register,
)
from optimizers.adamw import fused_adamw
from optimizers.newton_schulz import COEFFICIENTS, orthogonalize
from optimizers.roles import folded, update_table
from optimizers.state import state_bytes

SHAPES = {"wide": (6, 24), "tall": (24, 6), "square": (8, 8), "gain": (16,)}


def parameters(seed=0, dtype=torch.float64, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for n, s in shapes.items()}


def gradients(params, steps, scale=1.0, seed=1):
    """Gradients of `steps` steps whose norms lie on both sides of 1."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for t in range(steps):
        size = scale * (0.05, 1.0)[t % 2]
        out.append({n: size * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()})
    return out


def run(optimizer, params, steps_of_gradients, lookahead=None):
    if lookahead is None and getattr(optimizer, "needs_lookahead", False):
        lookahead = steps_of_gradients
    for t, step in enumerate(steps_of_gradients):
        if lookahead:
            for n, p in params.items():
                p.grad = lookahead[t][n].clone()
            optimizer.update_previous_grad()
        for n, p in params.items():
            p.grad = step[n].clone()
        optimizer.step()
        optimizer.zero_grad()
        if lookahead:
            optimizer.update_last_grad()


def newton_schulz(G, steps=5, eps=0.0):
    """The published iteration, spelled out."""
    a, b, c = COEFFICIENTS
    X = G.mT if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + eps)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[0] > G.shape[1] else X


# ---- the papers' equations in float64


def recurrence(kind, p, grads, previous_grads, *, lr, wd, betas, gamma, clip, eps=1e-8, raw=False):
    """One tensor through the equations of the papers; previous_grads: None for the approximate form.

    raw: v averages the squares of raw gradients.
    """
    beta1, beta2 = betas
    m = v = previous = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        c = g + gamma * beta1 / (1 - beta1) * (g - previous)
        if clip and c.norm() > 1:
            c = c / c.norm()
        previous = g if previous_grads is None else previous_grads[t - 1]
        m = beta1 * m + (1 - beta1) * c
        v = beta2 * v + (1 - beta2) * (g * g if raw else c * c)
        if kind == "adamw":
            u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        elif kind == "lion":
            u = m.sign()
        elif kind == "shampoo":
            u = math.sqrt(max(1, p.shape[0] / p.shape[1])) * newton_schulz(m)
        elif kind == "mars-m":
            u = 0.2 * math.sqrt(max(p.shape)) * newton_schulz(m)
        p = p - lr * (wd * p + u)
    return p


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "lion", "shampoo"])
def test_mars_agrees_with_its_equations(kind, clip, exact):
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads, ahead = gradients(params, 50), gradients(params, 50, seed=2)
    settings = dict(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1, gamma=0.05)
    optimizer = MARS(
        params.values(), **settings, mars_type=f"mars-{kind}", clip_c=clip, optimize_1d=True, is_approx=not exact
    )
    run(optimizer, params, grads, ahead if exact else None)
    for n, p in params.items():
        rule = "adamw" if kind == "shampoo" and p.dim() == 1 else kind
        previous = [a[n] for a in ahead] if exact else None
        common = dict(lr=3e-3, wd=0.1, betas=(0.9, 0.98), gamma=0.05, clip=clip)
        expected = recurrence(rule, start[n], [g[n] for g in grads], previous, **common)
        close(p, expected, orthogonal=rule == "shampoo")


@pytest.mark.parametrize("clip", [True, False])
def test_the_second_moment_of_mars_may_be_that_of_raw_gradients(clip):
    """The other choice that remark 3.2 of the MARS paper names; without correction both are one."""
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads = gradients(params, 50)
    settings = dict(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1, clip_c=clip, optimize_1d=True)
    run(MARS(params.values(), **settings, gamma=0.05, second_moment="raw"), params, grads)
    for n, p in params.items():
        common = dict(lr=3e-3, wd=0.1, betas=(0.9, 0.98), gamma=0.05, clip=clip)
        close(p, recurrence("adamw", start[n], [g[n] for g in grads], None, **common, raw=True))
        assert (p - recurrence("adamw", start[n], [g[n] for g in grads], None, **common)).abs().max() > 1e-4
    if not clip:
        raw = dict(settings, gamma=0.0, second_moment="raw")
        two_runs(lambda p: MARS(p, **settings, gamma=0.0), lambda p: MARS(p, **raw))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("clip", [True, False])
def test_mars_m_agrees_with_its_equations(clip, exact):
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads, ahead = gradients(params, 50), gradients(params, 50, seed=2)
    optimizer = MARSM(
        params.values(),
        lr=3e-3,
        weight_decay=0.1,
        momentum=0.9,
        gamma=0.05,
        clip_c=clip,
        is_approx=not exact,
        adamw_eps_first=False,
    )
    run(optimizer, params, grads, ahead if exact else None)
    for n, p in params.items():
        matrix = p.dim() == 2
        previous = [a[n] for a in ahead] if exact else None
        common = dict(lr=3e-3, wd=0.1, betas=(0.9, 0.95))
        common |= dict(gamma=0.05, clip=clip) if matrix else dict(gamma=0.0, clip=False)
        expected = recurrence("mars-m" if matrix else "adamw", start[n], [g[n] for g in grads], previous, **common)
        close(p, expected, orthogonal=matrix)


@pytest.mark.parametrize("scale", ["moonlight", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_agrees_with_its_equations(nesterov, scale):
    params = parameters(shapes={n: s for n, s in SHAPES.items() if len(s) == 2})
    start = {n: p.detach().clone() for n, p in params.items()}
    grads = gradients(params, 50)
    run(Muon(params.values(), lr=3e-3, weight_decay=0.1, momentum=0.9, nesterov=nesterov, scale=scale), params, grads)
    for n, p in params.items():
        rows, columns = p.shape
        factor = 0.2 * math.sqrt(max(rows, columns)) if scale == "moonlight" else math.sqrt(max(1, rows / columns))
        q, m = start[n], torch.zeros_like(p)
        for g in grads:
            m = 0.9 * m + g[n]
            q = q - 3e-3 * (0.1 * q + factor * newton_schulz(g[n] + 0.9 * m if nesterov else m))
        close(p, q, orthogonal=True)


def test_lion_agrees_with_its_equations():
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads = gradients(params, 50)
    run(Lion(params.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1), params, grads)
    for n, p in params.items():
        q, m = start[n], torch.zeros_like(p)
        for g in grads:
            q = q - 1e-3 * (0.1 * q + (0.9 * m + 0.1 * g[n]).sign())
            m = 0.98 * m + 0.02 * g[n]
        close(p, q)


def close(ours, expected, orthogonal=False):
    """Newton-Schulz runs in float32, everything else here in float64."""
    tolerance = 2e-5 if orthogonal else 1e-11
    torch.testing.assert_close(ours.detach(), expected.detach(), atol=tolerance, rtol=tolerance)


# ---- identities


def two_runs(make_one, make_two, steps=20, atol=1e-11, shapes=SHAPES, scale=1.0):
    one = parameters(shapes=shapes)
    two = copy.deepcopy(one)
    grads = gradients(one, steps, scale)
    run(make_one(one.values()), one, grads)
    run(make_two(two.values()), two, grads)
    for n in one:
        torch.testing.assert_close(one[n].detach(), two[n].detach(), atol=atol, rtol=atol)


MATRICES = {n: s for n, s in SHAPES.items() if len(s) == 2}


def test_mars_adamw_without_correction_is_adamw():
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    two_runs(
        lambda p: MARS(p, **settings, gamma=0.0, clip_c=False, optimize_1d=True),
        lambda p: torch.optim.AdamW(p, **settings),
    )
    two_runs(
        lambda p: MARS(p, **settings, gamma=0.0, clip_c=False, optimize_1d=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, **settings, amsgrad=True),
    )


@pytest.mark.parametrize("gamma", [0.02, 0.1])
def test_unclipped_mars_lion_is_lion(gamma):
    """Lemma 3.4 of the MARS paper: MARS-Lion with momentum beta is Lion with (beta (1 - gamma), beta).

    At gamma = 1 - beta2 (0.02 here) that is Lion with beta1 = beta2^2.
    """
    beta = 0.98
    mars = dict(betas=(beta, 0.99), gamma=gamma, mars_type="mars-lion", clip_c=False, optimize_1d=True)
    two_runs(
        lambda p: MARS(p, lr=1e-3, **mars),
        lambda p: Lion(p, lr=1e-3, betas=(beta * (1 - gamma), beta)),
    )


def adan(p, grads, *, lr, wd, betas, eps=1e-8):
    """Adan (Xie et al. 2022, arXiv 2208.06677), in its paper's notation, where betas weigh what is new.

    With bias correction and decoupled decay, as in its official code. The gradient before the first is zero.
    """
    b1, b2, b3 = betas
    m = v = n = previous = torch.zeros_like(p)
    for k, g in enumerate(grads, start=1):
        difference, previous = g - previous, g
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * difference
        n = (1 - b3) * n + b3 * (g + (1 - b2) * difference) ** 2
        u = m / (1 - (1 - b1) ** k) + (1 - b2) * v / (1 - (1 - b2) ** k)
        p = p - lr * wd * p - lr * u / ((n / (1 - (1 - b3) ** k)).sqrt() + eps)
    return p


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.99), (0.98, 0.92)])
def test_unclipped_mars_adamw_at_gamma_one_minus_beta1_is_adan(beta1, beta2):
    """The MARS paper, equations 3.16 to 3.18.

    c = g + gamma beta1 / (1 - beta1) (g - previous) has Adan's weight beta1 on the difference if gamma = 1 - beta1.
    Then m is the sum of Adan's two averages, of gradients and of differences, if both decay by beta1; v is Adan's n.
    """
    params = parameters()
    start = {n: p.detach().clone() for n, p in params.items()}
    grads = gradients(params, 50)
    settings = dict(lr=3e-3, betas=(beta1, beta2), weight_decay=0.1, clip_c=False, optimize_1d=True)
    run(MARS(params.values(), **settings, gamma=1 - beta1), params, grads)
    for n, p in params.items():
        tensor_grads = [g[n] for g in grads]
        close(p, adan(start[n], tensor_grads, lr=3e-3, wd=0.1, betas=(1 - beta1, 1 - beta1, 1 - beta2)))
        other = adan(start[n], tensor_grads, lr=3e-3, wd=0.1, betas=(1 - beta1, 0.5, 1 - beta2))
        assert (p - other).abs().max() > 1e-4  # with another average of differences it is not MARS


def test_mars_m_without_correction_is_plain_muon():
    two_runs(
        lambda p: MARSM(p, lr=1e-2, gamma=0.0, clip_c=False),
        lambda p: Muon(p, lr=1e-2, weight_decay=0.1, nesterov=False),
        atol=1e-5,
    )


def test_mars_m_at_gamma_one_minus_beta_is_torchs_nesterov_muon(monkeypatch):
    """torch's Muon in float32: its cast to bfloat16 is replaced, since ours iterates in float32 on a CPU."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    settings = dict(lr=1e-2, weight_decay=0.1, momentum=0.95)
    two_runs(
        lambda p: MARSM(p, **settings, gamma=0.05, clip_c=False),
        lambda p: torch.optim.Muon(p, **settings, nesterov=True, adjust_lr_fn="match_rms_adamw"),
        atol=2e-5,
        shapes=MATRICES,
    )


def test_one_buffer_mars_m_equals_two_buffers():
    two_runs(
        lambda p: MARSM(p, lr=1e-2, gamma=0.05, clip_c=False),
        lambda p: MARSM(p, lr=1e-2, gamma=0.05, clip_c=False, keep_previous=True),
        atol=1e-5,
    )
    two_runs(  # and both equal the clipped rule as long as nothing is clipped
        lambda p: MARSM(p, lr=1e-2, gamma=0.05, clip_c=False),
        lambda p: MARSM(p, lr=1e-2, gamma=0.05, clip_c=True),
        atol=1e-5,
        scale=1e-3,
    )


def test_the_clip_is_really_switched():
    one, two = parameters(), parameters()
    grads = gradients(one, 4)
    run(MARSM(one.values(), lr=1e-2, clip_c=True), one, grads)
    run(MARSM(two.values(), lr=1e-2, clip_c=False), two, grads)
    assert (one["wide"] - two["wide"]).abs().max() > 1e-4


def test_exact_mode_given_this_steps_gradients_is_approximate_mode():
    one, two = parameters(), parameters()
    grads = gradients(one, 10)
    run(MARS(one.values(), lr=1e-2), one, grads)
    run(MARS(two.values(), lr=1e-2, is_approx=False), two, grads, lookahead=grads)
    for n in one:
        assert torch.equal(one[n], two[n])


def test_split_qkv_orthogonalizes_three_matrices():
    g = torch.randn(24, 8)
    whole, split = nn.Parameter(torch.zeros(24, 8)), nn.Parameter(torch.zeros(24, 8))
    for p, blocks in ((whole, 1), (split, 3)):
        optimizer = Muon([{"params": [p], "blocks": blocks}], lr=1.0, nesterov=False)
        p.grad = g.clone()
        optimizer.step()
    expected = torch.cat([-0.2 * math.sqrt(8) * newton_schulz(part) for part in g.split(8)])
    torch.testing.assert_close(split.detach(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, split, atol=1e-2)


def test_convolution_filters_are_flattened():
    conv, flat = nn.Parameter(torch.zeros(6, 4, 3, 3)), nn.Parameter(torch.zeros(6, 36))
    g = torch.randn(6, 4, 3, 3)
    conv.grad, flat.grad = g, g.reshape(6, 36).clone()
    Muon([conv]).step()
    Muon([flat]).step()
    torch.testing.assert_close(conv.reshape(6, 36), flat)


# ---- Newton-Schulz


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 64), (2, 64, 16), (2, 40, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_brings_singular_values_into_the_published_band(shape, dtype):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(G, dtype=dtype)
    assert out.dtype == dtype
    values = torch.linalg.svdvals(out.float())
    large = torch.linalg.svdvals(G) > 0.05 * torch.linalg.matrix_norm(G)[:, None]
    assert values[large].min() > 0.65
    assert values.max() < 1.25
    for one, matrix in zip(out, G, strict=True):
        torch.testing.assert_close(one, orthogonalize(matrix[None], dtype=dtype)[0])


@pytest.mark.parametrize("shape", [(64, 256), (96, 288), (256, 64), (40, 400), (393, 801)])
def test_iterating_on_the_gram_matrix_stays_within_rounding(shape):
    """float32 against float64 of the plain iteration, also for badly conditioned matrices."""
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=g, dtype=torch.float64), full_matrices=False)
    for decay in (1, 1e-3, 1e-6):
        S = torch.logspace(0, math.log10(decay), min(shape), dtype=torch.float64)
        G = U @ torch.diag(S) @ Vh
        error = (orthogonalize(G.float()[None], dtype=torch.float32)[0] - newton_schulz(G)).norm()
        assert error < 1e-4 * newton_schulz(G).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_large_small_and_rank_deficient_matrices_stay_finite(dtype):
    rank_one = torch.outer(torch.randn(8), torch.randn(32))
    for G in (torch.zeros(8, 32), 1e15 * torch.randn(8, 32), 1e-15 * torch.randn(8, 32), rank_one, rank_one.T):
        out = orthogonalize(G[None].contiguous(), dtype=dtype)
        assert torch.isfinite(out).all()
        assert torch.linalg.svdvals(out.float()).max() < 1.3
    G = torch.randn(1, 8, 32)  # without eps, its scale does not matter
    for scale in (1e-15, 1e15):
        torch.testing.assert_close(orthogonalize(scale * G, eps=0.0), orthogonalize(G), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("smallest", [0.1, 1e-3, 1e-6])
def test_float16_is_closer_to_the_exact_iteration_than_bfloat16(smallest):
    """Singular values from 1 down to `smallest`, against float64: three bits more are a factor of eight."""
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(64, 192, generator=g, dtype=torch.float64), full_matrices=False)
    G = U @ torch.diag(torch.logspace(0, math.log10(smallest), 64, dtype=torch.float64)) @ Vh
    exact = newton_schulz(G)
    error = {d: (orthogonalize(G.float()[None], dtype=d)[0] - exact).norm() for d in (torch.float16, torch.bfloat16)}
    assert error[torch.float16] < error[torch.bfloat16] / 5
    assert error[torch.float16] < 0.02 * exact.norm()


# ---- being an ordinary optimizer


OURS = {make.__name__.lower(): make for make, _ in REGISTRY.values() if make is not fused_adamw}
EVERY = {name: partial(make, lr=1e-2) for name, make in sorted(OURS.items())} | {
    "mars-raw": partial(MARS, lr=1e-2, second_moment="raw", clip_c=False),
    "mars-exact": partial(MARS, lr=1e-2, is_approx=False),
    "mars-lion": partial(MARS, lr=1e-2, mars_type="mars-lion"),
    "mars-shampoo": partial(MARS, lr=1e-2, mars_type="mars-shampoo", amsgrad=True),
    "marsm-one-buffer": partial(MARSM, lr=1e-2, clip_c=False),
    "ademamix": partial(AdEMAMix, lr=1e-2, slow_warmup=5),
    "soap": partial(SOAP, lr=1e-2, refresh_every=1),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
APPROXIMATE = {name: make for name, make in EVERY.items() if name != "mars-exact"}
approximate = pytest.mark.parametrize("make", APPROXIMATE.values(), ids=APPROXIMATE.keys())


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
