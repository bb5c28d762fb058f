"""Schedules against their formulas."""

import math

import pytest
import torch

from optimizers import MARSM, Lion, LionConfig, MARSMConfig
from training.schedule import SHAPES, ScheduleConfig, learning_rate, moved, parse_moves, set_rates


def test_cosine_with_warm_up():
    config = ScheduleConfig(shape="cosine", warmup=4, min_lr=0.1)
    rates = [learning_rate(config, step, 10, 1.0) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 11):
        assert rates[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 6)))
    assert rates[10] == pytest.approx(0.1)


def test_zero_first_is_the_official_warm_up():
    config = ScheduleConfig(warmup=4, zero_first=True)
    assert [learning_rate(config, step, 10, 1.0) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_wsd_is_constant_and_then_decays_linearly():
    config = ScheduleConfig(shape="wsd", warmup=0, min_lr=0.2, wsd_decay=0.5)
    rates = [learning_rate(config, step, 8, 1.0) for step in range(9)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_exponential_has_the_formula_of_the_official_code():
    """min_lr + 0.9^(100 progress) (lr - min_lr)"""
    config = ScheduleConfig(shape="exponential", warmup=0, min_lr=0.5)
    assert learning_rate(config, 7, 100, 2.0) == pytest.approx(0.5 + 0.9**7 * 1.5)


def test_constant_and_linear():
    for shape, expected in (("constant", [3, 3, 3]), ("linear", [3, 2, 1])):
        config = ScheduleConfig(shape=shape, warmup=0, min_lr=1.0)
        assert [learning_rate(config, step, 10, 3.0) for step in (0, 5, 10)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_starts_at_the_peak(shape):
    assert learning_rate(ScheduleConfig(shape=shape, warmup=0), 0, 10, 0.7) == pytest.approx(0.7)


def test_errors_are_named():
    errors = ScheduleConfig(shape="step", warmup=-1, min_lr=-1, min_lr_ratio=2, wsd_decay=0, moves="gamma").errors()
    keys = {error.split("=")[0] for error in errors}
    assert keys == {"shape", "warmup", "min_lr", "min_lr_ratio", "wsd_decay", "moves"}


# ---- hyperparameters that move


def test_moves_are_names_and_final_values():
    assert parse_moves("") == {}
    assert parse_moves("gamma:0.05, momentum:9.8e-1") == {"gamma": 0.05, "momentum": 0.98}
    assert [moved(0.02, 0.1, step, 5) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert moved(0.02, 0.1, 0, 1) == 0.02
    assert moved(0.02, 0.1, 9, 5) == 0.1  # a bench may train beyond the end
    assert parse_moves("gamma:0.05,weight_decay: lr") == {"gamma": 0.05, "weight_decay": None}


def test_the_weight_decay_follows_the_learning_rate_so_that_weights_shrink_by_its_square():
    """Lion on a zero gradient does nothing but decay: p <- (1 - lr(t) wd lr(t) / peak) p, and half of it in a group."""
    optim, steps = LionConfig(lr=0.5, weight_decay=0.8), 12
    params = [torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, (0.8, 0.4, 0.0), strict=True)]
    optimizer, expected = Lion(groups, **optim.as_group()), [1.0, 1.0, 1.0]
    for step in range(steps):
        set_rates(optimizer, optim, ScheduleConfig(warmup=4), {"weight_decay": None}, step, steps)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 8))  # down to a tenth
        relative = (step + 1) / 4 if step < 4 else cosine
        expected = [x * (1 - 0.5 * relative * wd * relative) for x, wd in zip(expected, (0.8, 0.4, 0.0), strict=True)]
    assert [p[0, 0].item() for p in params] == pytest.approx(expected, rel=1e-12)


def test_any_number_of_an_optimizer_moves_and_groups_keep_their_proportion():
    optim = MARSMConfig(lr=0.1, weight_decay=0.2, gamma=0.02)
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    optimizer = MARSM(
        [{"params": [p], "weight_decay": decay} for p, decay in zip(params, (0.2, 0.1, 0.0), strict=True)],
        **optim.as_group() | {"weight_decay": 0.2},
    )
    schedule = ScheduleConfig(shape="constant", warmup=0)
    seen = []
    for step in range(3):
        assert set_rates(optimizer, optim, schedule, {"gamma": 0.06, "weight_decay": 0.4}, step, 3) == 0.1
        seen.append([(g["gamma"], g["weight_decay"]) for g in optimizer.param_groups])
    assert [[round(gamma, 9) for gamma, _ in row] for row in seen] == [[0.02] * 3, [0.04] * 3, [0.06] * 3]
    decays = [[decay for _, decay in row] for row in seen]
    assert decays == [pytest.approx(row) for row in ([0.2, 0.1, 0], [0.3, 0.15, 0], [0.4, 0.2, 0])]


def test_the_final_rate_is_min_lr_or_a_fraction_of_the_peak():
    ends = [learning_rate(ScheduleConfig(warmup=0, **final), 10, 10, 2.0) for final in ({}, dict(min_lr_ratio=0.03))]
    assert ends == pytest.approx([0.2, 0.06])
    assert learning_rate(ScheduleConfig(warmup=0, min_lr=0.5), 10, 10, 2.0) == 0.5
