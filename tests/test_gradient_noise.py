"""The noise of the gradient, and the gamma that it asks for."""

import json

import pytest
import torch

from experiments import gradient_noise
from experiments.gradient_noise import best_gamma, combined, lowest


@pytest.mark.parametrize("a", [0.0, 0.04, 0.06, 0.1, 0.5, 5.0])
def test_best_gamma_has_the_smallest_error(a):
    beta = 0.95

    def error(gamma):
        return a * (1 - gamma) ** 2 + 2 * gamma * (1 - gamma) * (1 - beta) + gamma**2

    assert error(best_gamma(a, beta)) <= min(error(i / 1000) for i in range(1001)) + 1e-12
    assert best_gamma(0.1, 0.95) == pytest.approx(0.05)  # where Muon with Nesterov momentum 0.95 is right


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_numbers_of_the_bench_are_checked(value):
    with pytest.raises(SystemExit, match=f"argument --points: {value}: must be"):
        gradient_noise.main(["run", f"--points={value}"])


def test_the_lowest_point_of_a_parabola():
    def error(x):
        return 3 * (x - 0.3) ** 2 + 1

    assert lowest((error(0), error(0.5), error(1))) == pytest.approx(0.3)
    assert lowest((1.0, 2.0, 3.0)) == 0


@pytest.mark.parametrize("exact", [False, True])
def test_the_momentum_of_the_bench_is_that_of_the_recursion(exact):
    """m <- beta m + (1 - beta) c with c = g + gamma beta / (1 - beta) (g - g')."""
    beta, gamma = 0.9, 0.3
    random = torch.Generator().manual_seed(0)
    g, before = (torch.randn(6, 3, dtype=torch.float64, generator=random) for _ in range(2))
    previous = before if exact else torch.cat((torch.zeros(1, 3, dtype=torch.float64), g[:-1]))
    m = torch.zeros(3, dtype=torch.float64)
    for now, last in zip(g, previous, strict=True):
        m = beta * m + (1 - beta) * (now + gamma * beta / (1 - beta) * (now - last))

    f = object.__new__(gradient_noise.Follower)
    f.beta, f.count = beta, 10**6
    f.average, f.change = [torch.zeros(3, dtype=torch.float64)], [torch.zeros(3, dtype=torch.float64)]
    for now, last in zip(g[:-1], before[:-1], strict=True):
        f.average = combined((beta, f.average), (1 - beta, [now]))
        f.change = combined((beta, f.change), (beta, [now - last]))
    found = f.momentum(gamma, [g[-1]], [g[-1] - before[-1]] if exact else None)
    torch.testing.assert_close(found[0], m)


def test_the_bench_measures_every_checkpoint_of_a_run(tmp_path, capsys):
    gradient_noise.main(["--smoke", f"--folder={tmp_path}"])
    (path,) = tmp_path.glob("*.jsonl")
    _, *rows = map(json.loads, path.read_text().splitlines())
    assert [row["step"] for row in rows] == [9, 15]  # three steps after the checkpoints of steps 6 and 12
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, problem",
    [
        ([], "RUN: give the folder of a run"),
        (["nothing"], "nothing: has no checkpoint"),
        (["nothing", "--checkpoints=last"], "nothing: has no checkpoint"),
    ],
)
def test_a_missing_run_is_one_line(words, problem):
    with pytest.raises(SystemExit, match=problem):
        gradient_noise.main(words)
