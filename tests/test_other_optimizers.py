"""Shampoo, AdEMAMix, SOAP and NorMuon against their equations in float64, written out independently.

SOAP on matrices is held by numbers of its authors' code (test_optimizers_golden.py).
"""

import math

import numpy as np
import pytest
import torch
from optimizer_steps import MATRICES, close, gradients, newton_schulz, parameters, run, two_runs

from optimizers import MARS, SOAP, AdEMAMix, NorMuon, Shampoo


def adamw(p, grads, lr, wd, betas, eps=1e-8):
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (wd * p + m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    return p


# ---- AdEMAMix


def half_life(beta):
    """Steps after which an average at decay beta has forgotten half."""
    return math.log(0.5) / math.log(beta)


@pytest.mark.parametrize("warmup, beta1", [(0, 0.9), (20, 0.9), (20, 0.0)])
def test_ademamix_agrees_with_its_equations(warmup, beta1):
    """alpha rises linearly; beta3 so that its half-life rises linearly from that of beta1 (arXiv 2409.03137).

    The half-life of beta1 = 0 is that of 1e-8, as in the authors' code.
    """
    params = parameters()
    start, grads = {n: p.detach().clone() for n, p in params.items()}, gradients(params, 40)
    settings = dict(lr=3e-3, betas=(beta1, 0.98), beta3=0.999, alpha=5.0, slow_warmup=warmup, weight_decay=0.1)
    run(AdEMAMix(params.values(), **settings), params, grads)
    for n, p in params.items():
        q, m1, m2, v = start[n], *(torch.zeros_like(p) for _ in range(3))
        for t, g in enumerate([g[n] for g in grads], start=1):
            done = min(1.0, t / warmup) if warmup else 1.0
            beta3 = 0.5 ** (1 / ((1 - done) * half_life(beta1 or 1e-8) + done * half_life(0.999)))
            m1, m2, v = beta1 * m1 + (1 - beta1) * g, beta3 * m2 + (1 - beta3) * g, 0.98 * v + 0.02 * g * g
            fast, root = m1 / (1 - beta1**t), (v / (1 - 0.98**t)).sqrt()
            q = q - 3e-3 * (0.1 * q + (fast + 5.0 * done * m2) / (root + 1e-8))
        close(p, q)


def test_ademamix_without_the_slow_average_is_adamw():
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    two_runs(lambda p: AdEMAMix(p, **settings, alpha=0.0), lambda p: torch.optim.AdamW(p, **settings))


# ---- Shampoo


def test_shampoo_moves_along_the_orthogonal_factor_of_its_momentum():
    params = parameters()
    start, grads = {n: p.detach().clone() for n, p in params.items()}, gradients(params, 30)
    run(Shampoo(params.values(), lr=3e-3, beta=0.9, weight_decay=0.1, adamw_lr=1e-3), params, grads)
    for n, p in params.items():
        if p.dim() == 1:
            close(p, adamw(start[n], [g[n] for g in grads], 1e-3, 0.1, (0.9, 0.95)))
            continue
        q, m = start[n], torch.zeros_like(p)
        for g in grads:
            m = 0.9 * m + g[n]
            q = q - 3e-3 * (0.1 * q + math.sqrt(max(1, p.shape[0] / p.shape[1])) * newton_schulz(m))
        close(p, q, orthogonal=True)


def test_one_step_of_shampoo_is_its_preconditioned_gradient():
    """(G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, within the band in which Newton-Schulz leaves singular values."""
    p = parameters(shapes={"square": (8, 8)}, dtype=torch.float32)["square"]
    before, p.grad = p.detach().clone(), torch.randn(8, 8)
    g = p.grad.double()
    Shampoo([p], lr=1.0, weight_decay=0.0).step()

    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors @ torch.diag(values ** (-1 / 4)) @ vectors.T

    expected, found = root(g @ g.T) @ g @ root(g.T @ g), (before - p.detach()).double()
    assert torch.linalg.matrix_norm(found - expected, 2) < 0.4
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def test_mars_shampoo_without_correction_and_clipping_is_shampoo():
    two_runs(
        lambda p: Shampoo(p, lr=1e-2, weight_decay=0.1),
        lambda p: MARS(p, lr=1e-2, weight_decay=0.1, mars_type="mars-shampoo", gamma=0.0, clip_c=False),
        shapes=MATRICES,
    )


# ---- NorMuon


@pytest.mark.parametrize("nesterov", [True, False])
def test_normuon_agrees_with_its_equations(nesterov):
    params = parameters(shapes=MATRICES)
    start, grads = {n: p.detach().clone() for n, p in params.items()}, gradients(params, 30)
    settings = dict(lr=3e-3, weight_decay=0.1, momentum=0.9, beta2=0.8, nesterov=nesterov)
    run(NorMuon(params.values(), **settings), params, grads)
    for n, p in params.items():
        q, m, v = start[n].numpy(), np.zeros(p.shape), np.zeros((p.shape[0], 1))
        for g in (step[n].numpy() for step in grads):
            m = 0.9 * m + g
            o = newton_schulz(torch.from_numpy(g + 0.9 * m if nesterov else m)).numpy()
            v = 0.8 * v + 0.2 * (o**2).mean(axis=1, keepdims=True)
            o = o / np.sqrt(v)
            q = q - 3e-3 * (0.1 * q + 0.2 * math.sqrt(o.size) * o / np.linalg.norm(o))
        close(p, torch.from_numpy(q), orthogonal=True)


def test_every_update_of_normuon_has_the_root_mean_square_of_adams():
    params = parameters(shapes=MATRICES)
    before = {n: p.detach().clone() for n, p in params.items()}
    run(NorMuon(params.values(), lr=1.0, weight_decay=0.0), params, gradients(params, 1))
    for n, p in params.items():
        assert (p.detach() - before[n]).square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


# ---- SOAP


def test_soap_updates_vectors_as_adamw_does():
    params = parameters(shapes={"square": (5, 5), "gain": (16,)})
    start, grads = params["gain"].detach().clone(), gradients(params, 12)
    run(SOAP(params.values(), lr=3e-3, betas=(0.9, 0.8), weight_decay=0.1), params, grads)
    close(params["gain"], adamw(start, [g["gain"] for g in grads], 3e-3, 0.1, (0.9, 0.8)))


def test_soap_keeps_no_preconditioner_of_a_side_above_the_limit():
    p = torch.nn.Parameter(torch.zeros(300, 4))
    p.grad = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    optimizer = SOAP([p], lr=1e-2, largest_side=299)
    for _ in range(2):
        optimizer.step()
    assert max(t.numel() for t in optimizer.state[p].values()) == p.numel()
    assert torch.isfinite(p).all()
    assert p.abs().min() > 0


def test_soap_starts_where_most_inputs_are_always_zero():
    """As for 3x3 filters over images of one pixel; eigenvectors of such a matrix in float32 do not converge."""
    p = torch.nn.Parameter(torch.zeros(32, 32, 3, 3))
    optimizer = SOAP([p], lr=1e-2)
    for seed in range(2):
        p.grad = torch.zeros_like(p)
        p.grad[:, :, 1, 1] = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert torch.isfinite(p).all()
    assert p.abs().max() > 0


@pytest.mark.parametrize("shape, largest_side", [((5, 5), 8), ((4, 9), 8)])
def test_soap_treats_a_matrix_and_its_transpose_alike(shape, largest_side):
    """Where both first preconditioners have full rank; in a null space, rounding decides the first basis."""
    params = parameters(shapes={"m": shape})
    turned = {"m": torch.nn.Parameter(params["m"].detach().T.clone())}
    grads = gradients(params, 10)
    run(SOAP(params.values(), lr=1e-2, largest_side=largest_side), params, grads)
    run(SOAP(turned.values(), lr=1e-2, largest_side=largest_side), turned, [{"m": g["m"].T} for g in grads])
    torch.testing.assert_close(params["m"].detach(), turned["m"].detach().T)
