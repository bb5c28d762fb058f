"""--ema: averaged weights are kept, saved, evaluated, and opened by eval/ beside the raw ones."""

import json

import pytest
import torch
from conftest import CONFIG, finish, launch
from safetensors.torch import load_file
from test_branches import assert_equal_weights, message, train

from runtime.files import sha256_of
from weights import read_trained

EMA = ("--ema=0.9", "--dropout=0")


def average(run, step=12):
    return load_file(run / f"checkpoints/step_{step:07d}/average.safetensors")


def evaluations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["val_loss_average"] for r in records if "val_loss_average" in r}


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run that has kept the checkpoint of every step."""
    return train(dataset, tmp_path_factory.mktemp("runs"), "run", *EMA, "--checkpoint.every=1", "--checkpoint.keep=20")


def test_the_average_is_that_of_the_recursion(run):
    weights = {s: load_file(run / f"checkpoints/step_{s:07d}/model.safetensors") for s in range(1, 13)}
    expected = average(run, 1)
    for step in range(2, 13):
        d = min(0.9, (1 + step) / (10 + step))
        expected = {name: d * x + (1 - d) * weights[step][name] for name, x in expected.items()}
    for name, x in average(run).items():
        torch.testing.assert_close(x, expected[name])
        assert not torch.equal(x, weights[12][name])


def test_it_is_evaluated_beside_the_weights_which_stay_as_they_are(run, dataset, tmp_path):
    plain = train(dataset, tmp_path, "plain", "--dropout=0")
    assert_equal_weights(*(load_file(r / "checkpoints/step_0000012/model.safetensors") for r in (run, plain)))
    assert evaluations(run).keys() == {4, 8, 12}
    assert not evaluations(plain)
    assert not (plain / "checkpoints/step_0000012/average.safetensors").exists()


def test_an_interrupted_run_and_two_processes_give_the_same_average(run, dataset, tmp_path):
    branch = train(dataset, tmp_path, "branch", *EMA, f"--branch_from={run}@5")
    assert_equal_weights(average(branch), average(run))
    finish(launch([str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=two", *EMA], processes=2))
    for name, x in average(tmp_path / "two").items():
        torch.testing.assert_close(x, average(run)[name], atol=2e-5, rtol=1e-3)


def test_eval_opens_it_by_a_suffix_of_the_path(run):
    trained, expected = read_trained(f"{run}:average"), average(run)
    expected["transformer.wte.weight"][trained.model.config.vocab_size :] = 0  # rows of no token
    assert_equal_weights(dict(trained.model.named_parameters()), expected)
    assert trained.name == "run:average"
    assert read_trained(run / "checkpoints/step_0000004").name == "run/step_0000004"


def test_a_run_starts_with_the_average_of_another(run, dataset, tmp_path):
    second = train(dataset, tmp_path, "second", f"--init_from={run}:average", "--steps=4")
    recorded = json.loads((second / "config.json").read_text())["init_sha256"]
    assert recorded == sha256_of(run / "checkpoints/step_0000012/average.safetensors")


def test_a_run_without_an_average_is_one_line(dataset, tmp_path):
    plain = train(dataset, tmp_path, "plain", "--steps=4")
    assert "keeps no averaged weights; train with --ema=0.999" in message(
        dataset, tmp_path, "second", f"--init_from={plain}:average"
    )
    assert "ema=1.0: must be a number" in message(dataset, tmp_path, "third", "--ema=1")
