"""Schedules against their formulas."""

import math

import pytest

from runtime.schedule import SHAPES, ScheduleConfig, interpolate, learning_rate


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


def test_wsd_holds_then_falls_linearly():
    config = ScheduleConfig(shape="wsd", warmup=0, min_lr=0.2, wsd_decay=0.5)
    rates = [learning_rate(config, step, 8, 1.0) for step in range(9)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_exponential_is_the_official_codes():
    """min_lr + 0.9^(100 progress) (lr - min_lr)"""
    assert interpolate("exponential", 0.07, 2.0, 0.5) == pytest.approx(0.5 + 0.9**7 * 1.5)


def test_constant_and_linear():
    assert [interpolate("constant", p, 3.0, 1.0) for p in (0, 0.5, 1)] == [3, 3, 3]
    assert [interpolate("linear", p, 0.1, 0.0) for p in (0, 0.5, 1)] == [0.1, 0.05, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_starts_at_the_peak(shape):
    assert interpolate(shape, 0.0, 0.7, 0.1) == pytest.approx(0.7)


def test_faults_are_named():
    faults = ScheduleConfig(shape="step", warmup=-1, min_lr=-1, min_lr_ratio=2, wsd_decay=0).faults()
    assert [fault.split("=")[0] for fault in faults] == ["shape", "warmup", "min_lr", "min_lr_ratio", "wsd_decay"]


def test_the_floor_is_a_share_of_the_peak_unless_it_is_given():
    ends = [learning_rate(ScheduleConfig(warmup=0, **floor), 10, 10, 2.0) for floor in ({}, dict(min_lr_ratio=0.03))]
    assert ends == pytest.approx([0.2, 0.06])
    assert learning_rate(ScheduleConfig(warmup=0, min_lr=0.5), 10, 10, 2.0) == 0.5
