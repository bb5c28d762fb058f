"""Runs that go on after their end, branch from a checkpoint of another run, or start with other weights."""

import json
import shutil

import pytest
import torch
from conftest import CONFIG, launch, make_dataset
from safetensors.torch import load_file

import train_gpt
from model import GPT
from weights import read_trained


def train(dataset, folder, name, *words):
    """A run of the tiny model; returns its folder."""
    train_gpt.main([str(CONFIG), f"--data.path={dataset}", f"--log.folder={folder}", f"--name={name}", *words])
    return folder / name


def weights(run, step):
    return load_file(run / f"checkpoints/step_{step:07d}/model.safetensors")


def assert_equal_weights(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def message(dataset, folder, name, *words):
    with pytest.raises(SystemExit) as stopped:
        train(dataset, folder, name, *words)
    return str(stopped.value)


WSD = ("--schedule.shape=wsd", "--wsd_decay=0.25", "--schedule.min_lr_ratio=0", "--schedule.min_lr=none")


def test_branches_of_one_wsd_run_equal_straight_runs_of_their_budgets(dataset, tmp_path):
    milestones = ("--checkpoint.every=16", "--checkpoint.milestone_every=4")
    trunk = train(dataset, tmp_path, "trunk", *WSD, "--steps=16", *milestones)
    for step, budget in ((4, 8), (8, 12)):
        branch = train(dataset, tmp_path, f"branch{budget}", *WSD, f"--steps={budget}", f"--branch_from={trunk}@{step}")
        straight = train(dataset, tmp_path, f"straight{budget}", *WSD, f"--steps={budget}")
        assert_equal_weights(weights(branch, budget), weights(straight, budget))
        assert losses(branch) == losses(straight)


def test_a_constant_run_continues_to_a_larger_budget_as_if_it_had_it_from_the_start(dataset, tmp_path, capsys):
    constant = ("--schedule.shape=constant",)
    train(dataset, tmp_path, "run", *constant, "--steps=8")
    longer = train(dataset, tmp_path, "run", *constant, "--steps=12")
    assert "note: steps: 8 -> 12" in capsys.readouterr().out
    straight = train(dataset, tmp_path, "straight", *constant, "--steps=12")
    assert_equal_weights(weights(longer, 12), weights(straight, 12))
    assert losses(longer) == losses(straight)


def test_a_cosine_run_gets_another_budget_only_if_changes_are_accepted(dataset, tmp_path):
    train(dataset, tmp_path, "run", "--steps=8")
    assert "steps: 8 -> 12" in message(dataset, tmp_path, "run", "--steps=12")
    assert 12 in losses(train(dataset, tmp_path, "run", "--steps=12", "--accept_changes"))
    refused = message(dataset, tmp_path, "run", "--steps=12", "--n_layer=1", "--accept_changes")
    assert "model.n_layer" in refused
    assert "--accept_changes continues" not in refused


def test_another_dataset_is_accepted_with_accept_changes(dataset, tmp_path):
    other = make_dataset(tmp_path / "other", tokens=15_000)
    train(dataset, tmp_path, "run", "--steps=8", "--schedule.shape=constant")
    words = ("--steps=12", "--schedule.shape=constant")
    assert "--accept_changes continues" in message(other, tmp_path, "run", *words)
    assert 12 in losses(train(other, tmp_path, "run", *words, "--accept_changes"))


def test_a_start_that_fails_does_not_change_what_the_corrected_command_finds(dataset, tmp_path):
    run = train(dataset, tmp_path, "run", "--steps=8")
    settings = (run / "config.json").read_bytes()
    assert "is smaller than the 8" in message(dataset, tmp_path, "run", "--steps=4", "--accept_changes")
    message(dataset, tmp_path, "run", "--steps=8", "--optimizer=lion", "--accept_changes")
    assert (run / "config.json").read_bytes() == settings
    train(dataset, tmp_path, "run", "--steps=8")

    assert "nowhere" in message(dataset, tmp_path, "tuned", "--init_from=nowhere")
    assert 12 in losses(train(dataset, tmp_path, "tuned", f"--init_from={run}"))

    message(dataset, tmp_path, "branch", f"--branch_from={run}@8", "--optimizer=lion")
    assert 12 in losses(train(dataset, tmp_path, "branch", f"--branch_from={run}@8"))


def test_a_fresh_start_that_fails_keeps_the_earlier_run(dataset, tmp_path):
    run = train(dataset, tmp_path, "run", "--steps=8")
    message(tmp_path / "nowhere", tmp_path, "run", "--fresh")
    assert weights(run, 8)


@pytest.mark.parametrize("source", ["nothing", "nothing@4", "{run}@5", "{run}"])
def test_a_branch_from_nothing_is_one_line(dataset, tmp_path, source):
    run = train(dataset, tmp_path, "run", "--steps=4")
    text = message(dataset, tmp_path, "branch", f"--branch_from={source.format(run=run)}")
    assert "branch_from=" in text
    assert ("nearest steps: 4" if "{run}" in source else "it has none") in text
    assert not (run.parent / "branch").exists()  # so that the corrected command starts
    assert "give RUN@STEP with a step that was kept" in text


def test_every_rank_learns_why_the_first_one_cannot_copy_the_origin(dataset, tmp_path):
    run = train(dataset, tmp_path, "run", "--steps=4")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    arguments = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=branch"]
    process = launch([*arguments, f"--branch_from={run}@4"], processes=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"train_gpt: run folder {tmp_path / 'branch'}: {run / 'metrics.jsonl'}: Is a directory" in printed
    assert "no answer" not in printed  # as of a lost rank


def test_a_step_of_a_run_has_a_name(dataset, tmp_path):
    """RUN@STEP names a checkpoint for --init_from and for every command that opens models."""
    run = train(dataset, tmp_path, "run", "--steps=8")
    assert read_trained(f"{run}@4").name == "run/step_0000004"
    text = message(dataset, tmp_path, "second", f"--init_from={run}@5", "--steps=4")
    assert f"no checkpoint {run}/checkpoints/step_0000005" in text
    assert "nearest steps: 4, 8" in text
    second = train(dataset, tmp_path, "second", f"--init_from={run}@4", "--steps=4")
    origin = json.loads((run / "checkpoints/step_0000004/state.json").read_text())
    settings = json.loads((second / "config.json").read_text())
    assert settings["init_sha256"] == origin["sha256"]["model.safetensors"]


def test_a_budget_smaller_than_what_is_done_is_refused(dataset, tmp_path):
    constant = ("--schedule.shape=constant",)
    run = train(dataset, tmp_path, "run", *constant, "--steps=8")
    text = "train_gpt: a budget of 4 steps is smaller than the 8 that are done"
    assert message(dataset, tmp_path, "run", *constant, "--steps=4") == text
    assert message(dataset, tmp_path, "branch", *constant, "--steps=4", f"--branch_from={run}@8") == text
    assert 12 in losses(train(dataset, tmp_path, "run", *constant, "--steps=12"))


def test_a_run_cannot_branch_into_itself(dataset, tmp_path):
    run = train(dataset, tmp_path, "run", "--steps=4")
    text = message(dataset, tmp_path, "run", "--steps=8", f"--branch_from={run}@4")
    assert text.endswith("a run cannot branch into itself; give another --name")


def test_a_run_starts_with_the_weights_of_another(dataset, tmp_path):
    first = train(dataset, tmp_path, "first")
    words = (f"--init_from={first}", "--lr=0", "--schedule.min_lr=0", "--steps=1", "--warmup=0")
    second = train(dataset, tmp_path, "second", *words)
    one, two = weights(first, 12), weights(second, 1)
    for name in one:  # the table has padding after the 60 tokens, which is never used
        assert torch.equal(one[name][:60], two[name][:60])
    saved = json.loads((first / "checkpoints/step_0000012/state.json").read_text())["sha256"]["model.safetensors"]
    for _ in range(2):  # the hash is still there when the run is resumed
        assert json.loads((second / "config.json").read_text())["init_sha256"] == saved
        train(dataset, tmp_path, "second", *words)
    assert json.loads((second / "config.json").read_text())["init_from"] == str(first)


def test_an_interrupted_run_with_other_first_weights_continues(dataset, tmp_path):
    first = train(dataset, tmp_path, "first")
    words = (f"--init_from={first}", "--seed=5")
    straight, stopped = train(dataset, tmp_path, "a", *words), train(dataset, tmp_path, "b", *words)
    shutil.rmtree(stopped / "checkpoints/step_0000012")
    shutil.rmtree(first)  # a resumed run does not need the source any more
    train(dataset, tmp_path, "b", *words)
    assert_equal_weights(weights(straight, 12), weights(stopped, 12))


def test_the_context_may_be_shorter_and_every_other_difference_is_named(dataset, tmp_path):
    first = train(dataset, tmp_path, "first")
    short = train(
        dataset,
        tmp_path,
        "short",
        f"--init_from={first}",
        "--block_size=8",
        "--lr=0",
        "--schedule.min_lr=0",
        "--steps=1",
        "--warmup=0",
    )
    one, two = weights(first, 12), weights(short, 1)
    assert torch.equal(one["transformer.wpe.weight"][:8], two["transformer.wpe.weight"])
    text = message(dataset, tmp_path, "other", f"--init_from={first}", "--n_layer=1", "--bias", "--block_size=32")
    for part in (
        "n_layer: the checkpoint has 2, the run 1",
        "bias: the checkpoint has False, the run True",
        "--block_size=16",
    ):
        assert part in text
    assert "missing" in message(dataset, tmp_path, "none", "--init_from=missing")
    damaged = first / "checkpoints/step_0000012"
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    assert f"checkpoint {damaged} is damaged" in message(dataset, tmp_path, "broken", f"--init_from={damaged}")


def test_a_file_of_nanogpt_starts_a_run(dataset, tmp_path):
    torch.manual_seed(3)
    from config.load import load_config

    shape = load_config(CONFIG, ["--bias", "--gelu=exact"]).model
    model = GPT(shape)
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=60, bias=True)
    content = {
        name: tensor[:60] if name.endswith("wte.weight") else tensor for name, tensor in model.state_dict().items()
    }
    torch.save({"model": content, "model_args": args, "iter_num": 7}, tmp_path / "ckpt.pt")
    words = (
        f"--init_from={tmp_path / 'ckpt.pt'}",
        "--lr=0",
        "--schedule.min_lr=0",
        "--steps=1",
        "--warmup=0",
        "--bias",
        "--gelu=exact",
    )
    run = train(dataset, tmp_path, "run", *words)
    found = weights(run, 1)
    assert all(torch.equal(found[name][: len(tensor)], tensor) for name, tensor in content.items())


def test_weights_move_to_another_dataset(dataset, tmp_path):
    first = train(dataset, tmp_path, "first")
    other = make_dataset(tmp_path / "other", tokens=9000)
    assert losses(train(other, tmp_path, "second", f"--init_from={first}"))[1] < losses(first)[1]
