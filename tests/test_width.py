"""experiments.width: best rates between tried ones, their slope, and the report of finished runs."""

import json
import math

import pytest
from scipy.stats import linregress, t

from config.load import to_dict
from experiments import width
from experiments.sweep import Sweep
from experiments.width import Grid, best_rate, slope
from training.folder import CONFIG
from training.logger import METRICS

RATES = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]


def bowl(best, lr):
    """A loss that is a parabola in the logarithm of the rate."""
    return 2 + 0.1 * math.log2(lr / best) ** 2


def test_the_best_rate_is_the_lowest_point_of_a_parabola():
    for best in (0.0021, 0.004, 0.0077):
        assert best_rate(RATES, [bowl(best, lr) for lr in RATES]) == pytest.approx(best)


def test_at_an_edge_and_beside_a_run_that_diverged_the_best_rate_is_the_tried_one():
    assert best_rate(RATES, [bowl(0.0001, lr) for lr in RATES]) == 0.001
    assert best_rate(RATES, [3.0, 2.5, 2.0, math.inf, math.inf, math.inf]) == 0.004


def test_the_slope_and_its_interval_are_those_of_a_least_squares_line():
    points = [(64, 0.011), (64, 0.009), (128, 0.006), (128, 0.0052), (256, 0.0026), (256, 0.0024)]
    found = linregress([math.log(w) for w, _ in points], [math.log(lr) for _, lr in points])
    assert slope(points) == pytest.approx((found.slope, t.ppf(0.975, 4) * found.stderr), rel=1e-3)
    assert slope([(w, 1 / w) for w in (64, 128, 256, 512)]) == pytest.approx((-1, 0), abs=1e-12)


def test_the_report_of_runs_whose_best_rate_halves_with_twice_the_width(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sweep, "root", str(tmp_path))
    for size in (64, 128, 256):
        grid = Grid("width", str(size), ["AdamW", "SOAP"], "AdamW")
        for run in grid.todo():
            loss = bowl(0.008 * 64 / size * 2 ** (0.1 * run.seed), run.lr) if run.arm == "AdamW" else run.lr
            run.path.mkdir(parents=True)
            (run.path / CONFIG).write_text(json.dumps(to_dict(run.config)))
            (run.path / METRICS).write_text(json.dumps(dict(step=300, tokens=1, val_loss=loss)) + "\n")
        assert grid.todo() == []
    width.main(["--arms", "AdamW", "SOAP", "--widths", "64", "128", "256", "--report_only", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    (written,) = tmp_path.glob("width_*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()[1:]]
    adamw, soap = rows[:2]
    assert float(adamw["slope"].split(" ±")[0]) == pytest.approx(-1)
    assert adamw["best lr, width 128"] == "0.0043 / 0.0046"
    # the best rate of width 64 among the tried ones, 0.008, is two doublings from the best of width 256, 0.002 x 2^0.15
    expected = sum(bowl(0.002 * 2**x, 0.008) - bowl(0.002 * 2**x, 0.002) for x in (0.1, 0.2)) / 2
    assert float(adamw["lost with the lr of 64, width 256"]) == pytest.approx(expected, abs=1e-4)
    assert soap["best lr, width 64"] == "0.001 / 0.001 (edge of the grid)"
    assert "| AdamW |" in out
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    missing = ["--arms", "AdamW", "Muon", "--widths", "64", "128", "--report_only", "--folder", str(tmp_path / "other")]
    width.main(missing)  # Muon has no runs
    assert "Muon" not in (tmp_path / "other" / written.name).read_text()
