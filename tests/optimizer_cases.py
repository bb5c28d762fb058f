"""Small parameters, gradients and runs for the tests of optimizers."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from optimizers import (
    MARS,
    MARSM,
    REGISTRY,
    SOAP,
    AdEMAMix,
)
from optimizers.adamw import fused_adamw
from optimizers.newton_schulz import QUINTIC

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
    a, b, c = QUINTIC
    X = G.mT if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + eps)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[0] > G.shape[1] else X


def close(ours, expected, orthogonal=False):
    """Newton-Schulz runs in float32, everything else here in float64."""
    tolerance = 2e-5 if orthogonal else 1e-11
    torch.testing.assert_close(ours.detach(), expected.detach(), atol=tolerance, rtol=tolerance)


MATRICES = {n: s for n, s in SHAPES.items() if len(s) == 2}


def two_runs(make_one, make_two, steps=20, atol=1e-11, shapes=SHAPES, scale=1.0):
    one = parameters(shapes=shapes)
    two = copy.deepcopy(one)
    grads = gradients(one, steps, scale)
    run(make_one(one.values()), one, grads)
    run(make_two(two.values()), two, grads)
    for n in one:
        torch.testing.assert_close(one[n].detach(), two[n].detach(), atol=atol, rtol=atol)


OURS = {make.__name__.lower(): make for make, _ in REGISTRY.values() if make is not fused_adamw}
EVERY = {name: partial(make, lr=1e-2) for name, make in sorted(OURS.items())} | {
    "mars-raw": partial(MARS, lr=1e-2, second_moment="raw", clip_c=False),
    "mars-exact": partial(MARS, lr=1e-2, is_approx=False),
    "mars-lion": partial(MARS, lr=1e-2, mars_type="mars-lion"),
    "mars-shampoo": partial(MARS, lr=1e-2, mars_type="mars-shampoo", amsgrad=True),
    "marsm-one-buffer": partial(MARSM, lr=1e-2, clip_c=False),
    "marsm-cautious": partial(MARSM, lr=1e-2, weight_decay_kind="cautious"),
    "mars-cautious": partial(MARS, lr=1e-2, weight_decay=0.1, weight_decay_kind="cautious"),
    "ademamix": partial(AdEMAMix, lr=1e-2, slow_warmup=5),
    "soap": partial(SOAP, lr=1e-2, refresh_every=1),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
APPROXIMATE = {name: make for name, make in EVERY.items() if name != "mars-exact"}
approximate = pytest.mark.parametrize("make", APPROXIMATE.values(), ids=APPROXIMATE.keys())
