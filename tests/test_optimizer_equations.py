"""The optimizers against the equations of their papers in float64, against each other, and against torch's classes."""

import math

import pytest
import torch
from optimizer_steps import MATRICES, SHAPES, close, gradients, newton_schulz, parameters, run, two_runs
from torch import nn

from optimizers import MARS, MARSM, Lion, Muon
from optimizers.newton_schulz import orthogonalize

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


# ---- identities


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_large_small_and_rank_deficient_matrices_stay_finite(dtype):
    rank_one = torch.outer(torch.randn(8), torch.randn(32))
    for G in (torch.zeros(8, 32), 1e15 * torch.randn(8, 32), 1e-15 * torch.randn(8, 32), rank_one, rank_one.T):
        out = orthogonalize(G[None].contiguous(), dtype=dtype)
        assert torch.isfinite(out).all()
        assert torch.linalg.svdvals(out.float()).max() < 1.3
    G = torch.randn(1, 8, 32)  # without eps, its scale does not matter
    for scale in (1e-15, 1e15):
        torch.testing.assert_close(orthogonalize(scale * G, eps=0.0), orthogonalize(G), atol=0.05, rtol=0.05)
