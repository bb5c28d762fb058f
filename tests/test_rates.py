"""experiments.rates: slopes, their intervals, the problem, and the rules that decide the exit status."""

import json

import numpy as np
import pytest
import torch

from experiments import rates
from experiments.rates import ARMS, MARS_M, MUON, Problem, bounds, measure, slope, slopes_of

STEPS = [256, 512, 1024]


def power_law(power, seeds=4, spread=0.0):
    noise = 1 + spread * np.linspace(-1, 1, seeds)
    return 3.0 * np.asarray(STEPS, dtype=float)[:, None] ** power * noise


def test_the_slope_of_a_power_law_is_its_exponent():
    assert slope(STEPS, power_law(-1 / 3).mean(1)) == pytest.approx(-1 / 3)
    assert slope(STEPS, np.stack([power_law(-0.25).mean(1), power_law(0.5).mean(1)])) == pytest.approx([-0.25, 0.5])


def test_the_interval_has_no_width_without_spread_and_covers_the_slope_with_it():
    value, draws = slopes_of(STEPS, power_law(-0.25))
    assert bounds(draws) == pytest.approx((value, value))
    random = np.random.default_rng(1)
    noisy = power_law(-0.25, seeds=64) * np.exp(0.1 * random.standard_normal((3, 64)))
    value, draws = slopes_of(STEPS, noisy)
    low, high = bounds(draws)
    # standard error of a slope over log 2 apart: sqrt(2) 0.1 / sqrt(64) / (2 log 2) = 0.0128
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0128, rel=0.35)
    assert low < value < high


def test_every_constant_of_the_schedules_was_among_those_tried():
    for arm in ARMS.values():
        assert arm.lr in rates.TUNING[0]
        assert arm.weight in rates.TUNING[1]
        assert arm.weight * (rates.SHORTEST / rates.TUNED_AT) ** arm.weight_power < 1  # beta stays positive


def test_the_problem_is_a_gradient_that_is_not_convex_and_its_noise_has_mean_zero():
    problem = Problem(steps=1, seeds=1)
    X = problem.start.double().requires_grad_()
    problem.P, problem.Q, problem.optimum = problem.P.double(), problem.Q.double(), problem.optimum.double()
    jacobian = torch.autograd.functional.jacobian(lambda x: problem.gradient(x[None])[0], X[0]).reshape(128, 128)
    torch.testing.assert_close(jacobian, jacobian.T, atol=1e-6, rtol=0)
    assert torch.linalg.eigvalsh(jacobian)[0] < 0
    samples = problem.samples()
    N = torch.stack([next(samples)[0] for _ in range(4000)])
    assert N.mean(0).abs().max() < 5 * N.std() / 4000**0.5 * 1.3
    along_D = (N[:, 1] * problem.D).sum((-2, -1)) / rates.ROWS
    assert ((along_D / along_D.std()) ** 3).mean() > 1  # skewed, as the exponential distribution
    torch.testing.assert_close(problem.D @ problem.D.T, torch.eye(rates.ROWS), atol=1e-5, rtol=0)


def test_the_exact_form_tracks_the_gradient_of_a_problem_without_multiplicative_noise(monkeypatch):
    """The noise of a sample then cancels in the difference, so only the first sample's noise is left to decay."""
    monkeypatch.setattr(Problem, "sampled", lambda self, full, X, sample: full + sample[0])
    exact, muon = (measure(ARMS[name], 128, seeds=2)[1, 0].mean() for name in (MARS_M, MUON))
    assert exact < 0.75 * muon


def found(**powers):
    """A measurement of power laws; arms that are not named are flat."""

    def measured(seeds, job):
        name, T = job
        gradient, error = powers.get(name, (0.0, 0.0))
        return np.stack([np.full((2, seeds), 3.0 * T**gradient), np.full((2, seeds), 3.0 * T**error)])

    return measured


AS_IN_THEORY = {MUON: (-0.25, -0.25), MARS_M: (-1 / 3, -1 / 3)}


def run(monkeypatch, tmp_path, powers):
    monkeypatch.setattr(rates, "_measure_job", found(**powers))
    monkeypatch.setattr(rates, "plot", lambda findings, path: None)
    rates.main(["--workers=1", f"--folder={tmp_path}"])


def test_measurements_as_in_theory_pass(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, AS_IN_THEORY)


@pytest.mark.parametrize(
    "arm, powers, rule",
    [
        (MARS_M, (-0.27, -0.27), "MARS-M's slope is below Muon's by more than 0.03"),
        (MARS_M, (-0.27, -0.27), "the interval of MARS-M's slope reaches -0.28"),
        (MUON, (-0.25, -0.22), "the slope of Muon's momentum error is -0.25 within 0.02"),
        (rates.APPROXIMATE, (0.0, -0.1), "the slope of the approximate form's momentum error is 0 within 0.02"),
        (rates.MUON_FAST, (-0.3, 0.0), "Muon, MARS-M's schedule: slope above that of Muon"),
        (rates.SMALL_GAMMA, (-0.4, 0.0), "MARS-M exact, gamma 0.025: slope above that of MARS-M exact, gamma 1"),
    ],
)
def test_a_broken_rule_is_named_and_ends_in_an_error(monkeypatch, tmp_path, arm, powers, rule):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, AS_IN_THEORY | {arm: powers})
    assert rule in stopped.value.code
    (path,) = tmp_path.glob("*.md")
    assert f"{rule}" in path.read_text()


def test_a_smoke_run_writes_tables_and_plot(tmp_path):
    rates.main(["--smoke", "--workers=1", f"--folder={tmp_path}"])
    (path,) = tmp_path.glob("rates_*.jsonl")
    facts, *rows = map(json.loads, path.read_text().splitlines())
    assert facts.keys() >= {"hardware", "torch", "date"}
    means = [r for r in rows if r["table"].startswith("nuclear norm")]
    assert [r["steps"] for r in means] == [64, 96, 64, 96]
    assert all(0 < r[arm] < 100 for r in means for arm in ARMS)
    assert len([r for r in rows if r["table"] == "rules"]) == 12
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert path.with_suffix(".md").exists()


def test_bad_options_are_one_line():
    for words in (["--workers=0"], ["--longest=300"]):
        with pytest.raises(SystemExit) as stopped:
            rates.main(words)
        assert "must be at least" in stopped.value.code
