"""gamma=auto chooses the strength of the correction from the noise of the gradient, and a bench measures that noise."""

import json

import pytest
import torch
from conftest import CONFIG, finish, launch
from test_branches import assert_equal_weights, message, train, weights

from bench import gradient_noise
from bench.gradient_noise import combined, lowest
from optimizers import MARSM, Muon
from runtime.distributed import ALONE
from runtime.gamma import EVERY, SMOOTHING, GammaTuner, best_gamma

AUTO = ("--optimizer=mars_m", "--gamma=auto", "--clip_c=false")
RUN = (
    *AUTO,
    "--dropout=0",
    "--batch_size=8",
    "--micro_batch=2",
    "--steps=40",
    "--checkpoint.every=20",
    "--eval_every=40",
)


def gammas(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["gamma"] for r in records if "gamma" in r}


@pytest.mark.parametrize("a", [0.0, 0.04, 0.06, 0.1, 0.5, 5.0])
def test_best_gamma_has_the_smallest_error(a):
    beta = 0.95

    def error(gamma):
        return a * (1 - gamma) ** 2 + 2 * gamma * (1 - gamma) * (1 - beta) + gamma**2

    assert error(best_gamma(a, beta)) <= min(error(i / 1000) for i in range(1001)) + 1e-12
    assert best_gamma(0.1, 0.95) == pytest.approx(0.05)  # where Muon with Nesterov momentum 0.95 is right


def test_the_estimates_of_noise_and_distance_are_unbiased():
    model = torch.nn.Linear(8, 4, bias=False)
    p = model.weight
    optimizer = MARSM([{"params": [p], "role": "matrix"}], clip_c=False, free_gamma=True)
    random = torch.Generator().manual_seed(0)
    full, average = (torch.randn(4, 8, generator=random) for _ in range(2))
    optimizer.state[p]["momentum"].copy_(average * (1 - 0.95**5))
    noise, distance, draws = [], [], 4000
    for _ in range(draws):
        tuner = GammaTuner(model, optimizer, ALONE, None)
        halves = [full + 2**0.5 * 0.3 * torch.randn(4, 8, generator=random) for _ in range(2)]  # s = 0.3 for the mean
        p.grad = halves[0] / 2
        tuner.keep_first_half()
        p.grad = (halves[0] + halves[1]) / 2
        tuner.estimate(step=5)
        noise.append(tuner.noise / (1 - SMOOTHING))
        distance.append(tuner.distance / (1 - SMOOTHING))
    for found, expected in ((noise, 32 * 0.3**2), (distance, float((average - full).square().sum()))):
        found = torch.tensor(found)
        assert abs(found.mean() - expected) < 4 * found.std() / draws**0.5


def test_the_momentum_that_is_free_of_gamma_gives_muon_at_gamma_1_minus_momentum():
    def trained(cls, **settings):
        p = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
        optimizer = cls([{"params": [p], "role": "matrix"}], lr=0.01, weight_decay=0.1, **settings)
        random = torch.Generator().manual_seed(0)
        for _ in range(10):
            p.grad = torch.randn(6, 4, generator=random, dtype=torch.float64)
            optimizer.step()
        return p

    auto = trained(MARSM, gamma=0.05, clip_c=False, free_gamma=True)
    torch.testing.assert_close(auto, trained(MARSM, gamma=0.05, clip_c=False), atol=1e-6, rtol=0)
    torch.testing.assert_close(auto, trained(Muon, scale="moonlight"), atol=1e-6, rtol=0)


def test_an_older_state_dict_without_the_key_is_loaded():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = MARSM([p])
    state = optimizer.state_dict()
    del state["param_groups"][0]["free_gamma"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["free_gamma"] is False


def test_gamma_auto_moves_gamma_and_an_interrupted_run_equals_an_uninterrupted_one(dataset, tmp_path):
    whole = train(dataset, tmp_path, "whole", *RUN, "--checkpoint.keep=3")
    found = gammas(whole)
    assert found[EVERY] == pytest.approx(0.05)  # the first estimate is in the next step
    assert len({found[EVERY], found[EVERY + 1], found[2 * EVERY + 1]}) == 3
    branch = train(dataset, tmp_path, "branch", *RUN, f"--branch_from={whole}@20")
    assert_equal_weights(weights(branch, 40), weights(whole, 40))
    assert gammas(branch)[40] == found[40]


def test_two_processes_choose_the_gamma_of_one(dataset, tmp_path):
    one = train(dataset, tmp_path, "one", *RUN)
    words = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=two", *RUN]
    finish(launch(words, processes=2))
    assert gammas(tmp_path / "two")[40] == pytest.approx(gammas(one)[40], rel=1e-3)


@pytest.mark.parametrize(
    "words, problem",
    [
        (("--clip_c=true",), "optim.gamma=auto and free_gamma=true: need clip_c=false and is_approx=true"),
        (("--is_approx=false",), "need clip_c=false and is_approx=true"),
        (("--gamma_end=0.1",), "gamma=auto: excludes gamma_end"),
        (("--momentum=0",), "gamma=auto: needs a momentum above 0"),
        (("--moves=momentum:0.5",), "gamma=auto: needs a momentum that does not move"),
        (("--batch_size=9",), "gamma=auto: needs an even number of sequences per process, and there are 9"),
    ],
)
def test_what_gamma_auto_cannot_do_is_one_line(dataset, tmp_path, words, problem):
    assert problem in message(dataset, tmp_path, "run", *AUTO, *words)
    assert problem in message(dataset, tmp_path, "run", *AUTO, *words, "--preflight")


def test_the_preflight_divides_the_halves_of_the_batch_as_the_run_does(dataset, tmp_path, capsys):
    run = train(dataset, tmp_path, "run", *AUTO, "--batch_size=12", "--micro_batch=12")
    train(dataset, tmp_path, "run", *AUTO, "--batch_size=12", "--micro_batch=12", "--preflight")
    assert json.loads((run / "environment.json").read_text())["micro_batch"] == 6
    assert "12 sequences = 1 processes x 6 x 2" in capsys.readouterr().out


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
