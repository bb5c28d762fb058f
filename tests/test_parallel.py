"""--shard: sharded runs equal those of replicas, and move freely between numbers of processes and ways to divide."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import CONFIG, finish, launch
from forked import Forked
from safetensors.torch import load_file
from small_runs import byte_dataset, hellaswag

import train_gpt
from config.load import load_config
from model import GPT
from optimizers.shards import cut
from runtime.command import one_line
from runtime.distributed import ALONE, World, start_world
from runtime.errors import UserError
from training.compute import ComputeConfig
from training.parallel import shards
from training.saving import replica_warning

OPTIMIZERS = {
    "adamw": "--optimizer=adamw --data.hellaswag={hellaswag} --data.hellaswag_every=1",
    "mars_m": "--optimizer=mars_m --is_approx=false --ema=0.9 --checkpoint.background=true",
    "normuon": "--optimizer=normuon --activation_checkpointing=true --micro_batch=1",
}


def train_each(machines, lines):
    """Do runs one after another in the same processes, which are divided over that many machines."""
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // machines)
    with one_line("train_each"), start_world("cpu") as world:
        for line in lines:
            config, *overrides = line.split()
            train_gpt.train_run(load_config(config, overrides), world, fresh=False, accept_changes=False)


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(key, r["step"]): r[key] for r in records for key in r if "loss" in key or "hellaswag" in key}


def weights(run, name="model", step=12):
    return load_file(run / f"checkpoints/step_{step:07d}/{name}.safetensors")


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Makes the arguments of a run: its name, its optimizer, and further words."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hellaswag(9)))
    dataset = byte_dataset(folder / "tokens")
    common = (
        f"{CONFIG} --data.path={dataset} --vocab_size=257 --log.folder={folder} --schedule.shape=constant --dropout=0"
    )

    def make(name, optimizer, *words):
        options = OPTIMIZERS[optimizer].format(hellaswag=folder / "hellaswag.jsonl")
        return " ".join([common, f"--name={name}", options, *words])

    make.folder = folder
    return make


def test_a_run_moves_between_processes_replicas_and_shards(line):
    for name in OPTIMIZERS:
        train_gpt.main(line(f"alone_{name}", name).split())
        train_gpt.main(line(f"moved_{name}", name, "--steps=3").split())
    lines = [line(f"moved_{name}", name, "--steps=5") for name in OPTIMIZERS]
    finish(Forked(train_each, 1, lines, processes=2))
    kinds = (("full", 7), ("hybrid", 9))
    lines = [line(f"moved_{name}", name, f"--shard={kind}", f"--steps={n}") for name in OPTIMIZERS for kind, n in kinds]
    printed = finish(Forked(train_each, 2, lines, processes=4))
    assert "shard      full: weights, gradients and state divided over 4 processes\n" in printed
    assert "shard      hybrid: weights, gradients and state divided over 2 processes, 2 copies\n" in printed
    for name in OPTIMIZERS:
        train_gpt.main(line(f"moved_{name}", name).split())
        alone, moved = (losses(line.folder / f"{start}_{name}") for start in ("alone", "moved"))
        assert ("hellaswag_acc", 12) in moved or name != "adamw"
        assert ("val_loss_average", 12) in moved or name != "mars_m"
        for key, loss in alone.items():
            assert moved[key] == pytest.approx(loss, abs=2e-4), (name, key)


def test_an_interrupted_sharded_run_equals_one_that_was_not(line):
    starts = (("once", 12), ("twice", 7), ("twice", 12))
    lines = [
        line(f"{start}_{name}", name, "--shard=hybrid", f"--steps={n}") for name in OPTIMIZERS for start, n in starts
    ]
    finish(Forked(train_each, 2, lines, processes=4))
    for name in OPTIMIZERS:
        once, twice = (line.folder / f"{start}_{name}" for start in ("once", "twice"))
        found = losses(twice)
        assert {key: found[key] for key in losses(once)} == losses(once)
        files = sorted(path.stem for path in (once / "checkpoints/step_0000012").glob("*.safetensors"))
        assert {"model", "optimizer-0", "optimizer-1"} <= set(files)
        for file in files:
            ours, theirs = weights(once, file), weights(twice, file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), file


def test_a_killed_sharded_run_continues_as_if_nothing_had_happened(line):
    words = line("killed", "mars_m", "--shard=full", "--steps=30", "--checkpoint.every=3").split()
    process = launch(words, processes=2)
    metrics = line.folder / "killed/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 9:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "continuing at step" in finish(launch(words, processes=2))
    finish(launch([word.replace("killed", "straight") for word in words], processes=2))
    for file in ("model", "average", "optimizer-0", "optimizer-1"):
        ours, theirs = (weights(line.folder / name, file, 30) for name in ("killed", "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_three_replicas_continue_bit_for_bit(line):
    """Sums over three processes depend on how gradients lie in buckets."""
    both = [line("r_once", "mars_m"), line("r_twice", "mars_m", "--steps=7"), line("r_twice", "mars_m")]
    finish(Forked(train_each, 1, both, processes=3))
    ours, theirs = (weights(line.folder / name) for name in ("r_once", "r_twice"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train_on_poison(line):
    """The gradient of every sequence with a W is not finite."""
    forward = GPT.forward

    def poisoned(self, idx, targets=None):
        loss = forward(self, idx, targets)
        return loss * float("nan") if self.training and (idx == ord("W")).any() else loss

    GPT.forward = poisoned
    train_each(1, [line])


def test_bad_sequences_are_named(line):
    run = Forked(train_on_poison, line("poisoned", "adamw", "--shard=full"), processes=2)
    output, _ = run.communicate()
    assert run.returncode == 1
    assert output.count("is not finite; earlier checkpoints are good; sequences: train_000000.bin@") == 1


def test_hybrid_needs_equal_machines():
    world = World(0, 6, torch.device("cpu"), local_size=4)
    assert shards("full", world) == 6
    with pytest.raises(UserError, match="shard=hybrid: 6 processes do not divide into machines of 4"):
        shards("hybrid", world)
    with pytest.raises(UserError, match="shard=hybrid: each machine has one process"):
        shards("hybrid", World(0, 2, torch.device("cpu")))
    assert shards("none", world) == shards("full", ALONE) == 1


def test_copies_per_step_are_refused():
    (error,) = ComputeConfig(shard="full", cast_weights="step").errors()
    assert error.startswith('shard="full": keeps no bfloat16 copies')


def test_a_whole_tensor_stays_whole_beside_a_whole_one():
    whole = torch.ones(3)
    assert cut(whole, torch.zeros(3)) is whole


def test_copies_are_compared_with_the_first_one(monkeypatch):
    world = World(0, 4, torch.device("cpu"))
    sums = [[1], [2], [1], [3]]
    monkeypatch.setattr(World, "gather", lambda self, item: sums)
    assert "rank 3 differ from those of the first 2 ranks" in replica_warning([torch.zeros(1)], world, shards=2)
    assert replica_warning([torch.zeros(1)], world, shards=4) == ""
