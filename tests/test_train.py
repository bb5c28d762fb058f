"""The trainer: what it learns, how it is interrupted and continued, and what stops it."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CONFIG,
    ROOT,
    VOCAB,
    change_state,
    draw_curves,
    environment,
    finish,
    launch,
    make_dataset,
    make_tokens,
)
from forked import Forked
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_gpt
from config.load import load_config
from data.loader import DataConfig, TrainLoader
from data.prepare.pretokenized import index_in_place
from data.shards import DataError, open_dataset
from model import GPT
from optimizers import MARSM
from runtime.command import one_line
from runtime.distributed import ALONE
from runtime.errors import UserError
from training import checkpoint, preflight
from training.checkpoint import Checkpointer, write_tensors
from training.clipping import GradientClipper
from training.folder import run_lock
from training.logger import read_metrics
from training.memory import MicroBatch
from training.schedule import learning_rate

FINAL = "checkpoints/step_0000012/model.safetensors"


def run_in_process(arguments, *more) -> Path:
    train_gpt.main([*arguments, *more])
    return folder_of(arguments)


def folder_of(arguments) -> Path:
    return Path(next(a for a in arguments if a.startswith("--log.folder=")).partition("=")[2]) / "run"


def series(folder: Path, key="loss") -> dict[int, float]:
    return {r["step"]: r[key] for r in read_metrics(folder / "metrics.jsonl") if key in r}


def assert_same_weights(a: Path, b: Path):
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory) -> Path:
    """The run folder of an uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("straight")
    return run_in_process([str(CONFIG), f"--data.path={dataset}", f"--log.folder={folder}", "--name=run"])


# ---- what a run is


def test_steps_equal_a_plain_loop(dataset, straight):
    """Batch order, accumulation, clipping, schedule and AdamW against a loop written out here."""
    run = load_config(CONFIG, [f"--data.path={dataset}"])
    torch.manual_seed(run.seed)
    model = GPT(run.model)
    matrices = [p for n, p in model.named_parameters() if model.parameter_roles()[n] == "matrix"]
    rest = [p for n, p in model.named_parameters() if model.parameter_roles()[n] != "matrix"]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    loader = TrainLoader(
        open_dataset(dataset, VOCAB), DataConfig(), block_size=16, batch_size=12, vocab_size=VOCAB, seed=run.seed
    )
    for step in range(12):
        tokens = torch.from_numpy(loader.batch(step).astype(np.int64))
        torch.manual_seed(run.seed + 1_000_003 * (step + 1))
        for part in tokens.split(3):
            (model(part[:, :-1], part[:, 1:]) / 4).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.schedule, step, 12, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        assert norm.item() == pytest.approx(series(straight, "grad_norm")[step + 1], rel=1e-4)
    for name, weights in load_file(straight / FINAL).items():
        torch.testing.assert_close(weights, dict(model.named_parameters())[name].data, atol=2e-5, rtol=1e-3)


def test_a_run_learns_and_leaves_a_folder_that_explains_it(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "plot_run", draw_curves)
    train_gpt.main([str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--steps=150", "--log.every=10"])
    (folder,) = tmp_path.iterdir()
    assert folder.name == "tiny_config-adamw-counting-28.8k"
    assert series(folder, "val_loss")[150] < 1.8 < 2.4 < series(folder)[10]  # from log 60 = 4.1 towards log 3 = 1.1
    record = next(r for r in read_metrics(folder / "metrics.jsonl") if r["step"] == 10)
    assert record.keys() >= {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_ms", "data_ms"}
    assert "mfu" not in record  # the peak of a CPU is not known
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 1e-2
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "batch      12 sequences = 1 processes x 3 x 4 accumulated = 192 tokens" in output
    assert f"run     {folder}" in output
    assert "bits/byte" in output


def test_micro_batch_and_evaluation_do_not_change_training(arguments, straight):
    folder = run_in_process(arguments, "--micro_batch=12", "--eval_every=5", "--dropout=0", "--val_windows=7")
    shutil.rmtree(folder)
    other = run_in_process(arguments, "--micro_batch=4", "--eval_every=3", "--dropout=0")
    reference = load_file(other / FINAL)
    shutil.rmtree(other)
    again = load_file(run_in_process(arguments, "--micro_batch=12", "--dropout=0") / FINAL)
    for name, weights in reference.items():
        torch.testing.assert_close(weights, again[name], atol=2e-5, rtol=1e-3)


def test_the_as_published_mode_trains(arguments):
    folder = run_in_process(arguments, "--as_published", "--optimizer=mars_m", "--lr=0.01")
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["seed"], saved["data"]["sampling"], saved["model"]["vocab_size"]) == (5000, "replacement", 64)
    assert series(folder, "lr")[1] == 0


def test_gradients_may_be_a_multiple_of_the_mean(arguments, straight):
    folder = run_in_process(arguments, "--grad_multiple=4")
    assert series(folder, "grad_norm")[1] == pytest.approx(4 * series(straight, "grad_norm")[1], rel=1e-5)
    assert series(folder)[1] == series(straight)[1]


def test_gamma_moves_linearly_over_the_run(arguments, monkeypatch):
    seen = []
    step = MARSM.step
    monkeypatch.setattr(MARSM, "step", lambda self: (seen.append(self.param_groups[0]["gamma"]), step(self)))
    run_in_process(arguments, "--optimizer=mars_m", "--gamma=0.1", "--gamma_end=0")
    assert seen == pytest.approx([0.1 * (11 - i) / 11 for i in range(12)])


def test_the_parameter_table_is_printed_and_kept(arguments, capsys):
    folder = run_in_process(arguments, "--optimizer=mars_m")
    lines = (folder / "parameters.txt").read_text().splitlines()
    assert len(lines) == 1 + len(load_file(folder / FINAL))
    rule = "MARSM: orthogonal update of the clipped, corrected gradient"
    assert f"transformer.h.1.mlp.c_fc.weight\t64x16\t{rule}\t0.006\t0.1" in lines
    output = capsys.readouterr().out
    assert "transformer.h.*.mlp.c_fc.weight (2)" in output
    assert "MB of optimizer state in this process" in output


def test_compiled_training_equals_eager(arguments, monkeypatch):
    """One graph for model and loss, which the trial of a micro-batch leaves ready; the slowest test of this file."""
    changes, graphs, accumulate = ["--dropout=0", "--steps=3", "--warmup=1"], [], train_gpt.Trainer.accumulate

    def tried(footprint, share, world, attempt):
        attempt(3)
        graphs.append(counters["stats"]["unique_graphs"])
        return MicroBatch(3, 0, 0)

    def counted(self, batch, step):
        loss = accumulate(self, batch, step)
        graphs.append(counters["stats"]["unique_graphs"])
        return loss

    eager = series(run_in_process(arguments, *changes))
    monkeypatch.setattr(preflight, "choose_micro_batch", tried)
    monkeypatch.setattr(train_gpt.Trainer, "accumulate", counted)
    counters.clear()
    compiled = series(run_in_process(arguments, *changes, "--compile=true", "--micro_batch=auto", "--fresh"))
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert graphs[:2] == [1, 1]


# ---- interruption


@pytest.mark.parametrize(("optimizer", "settings"), [("adamw", []), ("mars_m", ["--gamma_end=0.1"])])
def test_a_run_that_an_earlier_version_began_continues(dataset, tmp_path, optimizer, settings):
    """tests/old_runs: step 6 of 12 as this command wrote it with format 2 of state.json, and step 12."""
    old = ROOT / "tests" / "old_runs" / optimizer
    shutil.copytree(old, tmp_path / optimizer)
    shape = ["--n_layer=1", "--n_embd=4", "--block_size=8", "--checkpoint.every=6"]
    places = [f"--data.path={dataset}", f"--log.folder={tmp_path}", f"--name={optimizer}"]
    train_gpt.main([str(CONFIG), *places, f"--optimizer={optimizer}", *shape, *settings])
    assert min(series(tmp_path / optimizer)) == 7
    weights, expected = (load_file(f) for f in (tmp_path / optimizer / FINAL, old / "expected_step_12.safetensors"))
    assert weights.keys() == expected.keys()
    for name in weights:  # another kind of processor may round differently
        torch.testing.assert_close(weights[name], expected[name], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_change_nothing(dataset, tmp_path, processes):
    """SIGKILL, three times, then a last start to the end: losses and weights are those of a straight run."""
    steps = ["--steps=60", "--checkpoint.every=7", "--eval_every=20"]
    common = [str(CONFIG), f"--data.path={dataset}", "--name=run", *steps]
    finish(launch([*common, f"--log.folder={tmp_path / 'straight'}"], processes))
    killed = [*common, f"--log.folder={tmp_path / 'killed'}"]
    chance = random.Random(processes)
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    for aim in (5, 25, 45):
        background = f"--checkpoint.background={'false' if aim == 25 else 'true'}"
        process = launch([*killed, background], processes)
        target, deadline = aim + chance.randrange(10), time.monotonic() + 120
        while not (metrics.exists() and f'"step": {target},' in metrics.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(launch([*killed, "--checkpoint.background=true"], processes))
    one, two = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert series(one, key) == series(two, key)
    last = "checkpoints/step_0000060"
    for name in ("model.safetensors", "optimizer-0.safetensors"):
        assert (one / last / name).read_bytes() == (two / last / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_finish_the_step_save_and_exit_cleanly(dataset, tmp_path, number):
    arguments = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--steps=100000"]
    process = launch([*arguments, "--checkpoint.every=100000"])
    wait_for_metrics(tmp_path / "run", process)
    process.send_signal(number)
    output = finish(process)
    assert f"{number.name}: will finish this step, save and stop" in output
    assert "the same command continues the run" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert max(series(tmp_path / "run")) == int(checkpoint.name[5:])


def test_a_signal_to_one_rank_stops_all_ranks_at_one_step(dataset, tmp_path):
    arguments = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--steps=100000"]
    process = launch([*arguments, "--checkpoint.every=100000"], processes=2)
    wait_for_metrics(tmp_path / "run", process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
    output = finish(process)
    assert output.count("the same command continues the run") == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step_")


def test_processes_whose_launcher_was_killed_save_and_leave(dataset, tmp_path):
    arguments = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--steps=100000"]
    process = launch([*arguments, "--checkpoint.every=100000"], processes=2)
    wait_for_metrics(tmp_path / "run", process)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)  # the pipe closes when the last process has left
    assert "the same command continues the run" in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert max(series(tmp_path / "run")) == int(checkpoint.name[5:])


@pytest.mark.parametrize("reader_leaves", [True, False])
def test_a_console_that_goes_away_or_is_full_does_not_stop_a_run(dataset, tmp_path, reader_leaves):
    command = f"{sys.executable} train_gpt.py {CONFIG} --data.path={dataset} --log.folder={tmp_path} --name=run"
    command += " | head -n 3" if reader_leaves else " > /dev/full"
    environ = environment() | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(series(tmp_path / "run")) == 12
    assert (tmp_path / "run" / FINAL).exists()


def test_a_run_saves_when_its_terminal_is_closed(dataset, tmp_path):
    ours, theirs = os.openpty()
    arguments = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--steps=100000"]
    command = [sys.executable, "train_gpt.py", *arguments, "--checkpoint.every=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    threading.Thread(target=lambda: [os.read(ours, 4096) for _ in range(3)], daemon=True).start()
    wait_for_metrics(tmp_path / "run", process)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert max(series(tmp_path / "run")) == int(checkpoint.name[5:])


def wait_for_metrics(folder: Path, process: subprocess.Popen):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(series(folder)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("step", [8, 12])
def test_an_evaluation_that_was_cut_short_is_made_when_the_run_continues(arguments, straight, monkeypatch, step):
    scores = train_gpt.Evaluator.scores

    def interrupted(self, now, stop, *rest):
        stop.signal = "SIGTERM" if now == step else None
        return scores(self, now, stop, *rest)

    monkeypatch.setattr(train_gpt.Evaluator, "scores", interrupted)
    monkeypatch.setattr(train_gpt.StopRequest, "agreed", lambda self, also: False)  # several ranks agree one step later
    folder = run_in_process(arguments)
    assert max(series(folder)) == step
    assert step not in series(folder, "val_loss")
    monkeypatch.undo()
    run_in_process(arguments)
    assert series(folder, "val_loss") == series(straight, "val_loss")
    assert (
        json.loads((folder / FINAL).with_name("state.json").read_text())["val_loss"] == series(folder, "val_loss")[12]
    )


def test_another_dataset_under_the_same_path_is_refused(arguments, tmp_path):
    moved = [a for a in arguments if not a.startswith("--data.path")] + [f"--data.path={tmp_path / 'tokens'}"]
    make_dataset(tmp_path / "tokens")
    run_in_process(moved)
    make_dataset(tmp_path / "tokens", tokens=15_000)
    assert "dataset: " in stops(moved)


def test_a_compiled_run_starts_its_compile_workers_first(arguments, monkeypatch):
    def start(processes):
        raise UserError(f"workers for {processes} processes")

    monkeypatch.setattr("training.compute.start_compile_workers", start)
    monkeypatch.setattr(train_gpt, "start_world", lambda device: nullcontext(replace(ALONE, local_size=8)))
    assert "workers for 8 processes" in stops(arguments, "--compile=true")


def test_a_folder_in_use_is_refused(arguments):
    with run_lock(folder_of(arguments), ALONE):
        for _ in range(2):  # a refused start leaves the lock where it is
            assert "is in use by another process" in stops(arguments)
    run_in_process(arguments)


def test_a_folder_without_its_config_is_not_entered(arguments, straight):
    shutil.copytree(straight, folder_of(arguments))
    config = folder_of(arguments) / "config.json"
    config.unlink()
    assert "has checkpoints and no config.json" in stops(arguments)
    state = json.loads((folder_of(arguments) / FINAL).with_name("state.json").read_text())
    config.write_text(json.dumps(state["config"]))
    run_in_process(arguments)


def test_values_of_a_wrong_type_in_a_config_file_are_named(tmp_path):
    text = CONFIG.read_text().replace("batch_size=12", 'batch_size="12"').replace("warmup=3", "warmup=0.5")
    (tmp_path / "wrong.py").write_text(text)
    message = stops([str(tmp_path / "wrong.py")])
    assert "config: batch_size='12': must be a whole number from 1 to 16,777,216 or none" in message
    assert "config: schedule.warmup=0.5: must be a whole number of at least 0" in message
    (tmp_path / "wrong.py").write_text(CONFIG.read_text().replace("AdamWConfig(lr=1e-2)", "AdamWConfig"))
    assert "optimizers['adamw'] must be the settings of an optimizer" in stops([str(tmp_path / "wrong.py")])


def test_out_of_memory_is_one_line(arguments):
    assert "out of memory; use a smaller --micro_batch or model" in stops(arguments, "--n_embd=100000000")


@pytest.mark.parametrize("changes", [[], ["--eval_every=5", "--val_windows=7", "--log.every=3", "--checkpoint.keep=1"]])
def test_a_start_of_a_finished_run_changes_no_file(arguments, straight, capsys, changes):
    folder = folder_of(arguments)
    shutil.copytree(straight, folder)
    before = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in [folder, *folder.rglob("*")]}
    run_in_process(arguments, *changes)
    assert "is finished: 12 steps, validation loss" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in [folder, *folder.rglob("*")]} == before


def test_a_best_loss_on_other_validation_data_does_not_count(arguments, straight, capsys):
    """The run goes on with fewer windows: a loss that was lower on others is not the best one any more."""
    folder = folder_of(arguments)
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints/step_0000012")
    change_state(folder / "checkpoints/step_0000008", best_val_loss=0.5)
    run_in_process(arguments, "--val_windows=7")
    note = "note: validation has other data, windows, tokens than before; earlier losses do not count"
    assert note in capsys.readouterr().out
    state = json.loads((folder / FINAL).with_name("state.json").read_text())
    assert state["best_val_loss"] == min(series(folder, "val_loss")[step] for step in (8, 12))
    records = {
        r["step"]: r["measured_on"]["windows"] for r in read_metrics(folder / "metrics.jsonl") if "val_loss" in r
    }
    assert records[12] == 7


def test_a_run_whose_batch_size_changes_reads_on_where_it_was(dataset, tmp_path):
    """4 sequences a step up to step 8, then 6: tokens go on from there, and no window comes twice or is left out."""
    run = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--micro_batch=2"]
    train_gpt.main([*run, "--batch_size=4"])
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints/step_0000012")
    read, ids = [], TrainLoader.window_ids
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainLoader, "window_ids", lambda self, step: read.append(ids(self, step)) or read[-1])
        train_gpt.main([*run, "--batch_size=6", "--accept_changes"])
    sizes = dict(block_size=16, vocab_size=VOCAB, seed=load_config(CONFIG).seed)
    loader = TrainLoader(open_dataset(dataset, VOCAB), DataConfig(), batch_size=1, **sizes)
    order = np.concatenate([loader.window_ids(i) for i in range(8 * 4, 8 * 4 + 4 * 6)])
    assert np.array_equal(np.concatenate(read)[: len(order)], order)
    expected = {step: 16 * (4 * min(step, 8) + 6 * max(0, step - 8)) for step in range(1, 13)}
    assert series(folder, "tokens") == expected
    state = json.loads((folder / FINAL).with_name("state.json").read_text())
    assert (state["step"], state["tokens"], state["sequences"]) == (12, 16 * 56, 56)


def test_a_budget_in_tokens_is_kept_when_the_batch_size_changes(dataset, tmp_path):
    """768 tokens are 12 steps of 64. After 8 of them, 256 tokens are left: 2 steps of 128."""
    run = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--micro_batch=2"]
    train_gpt.main([*run, "--batch_size=4", "--tokens=768"])
    shutil.rmtree(tmp_path / "run" / "checkpoints/step_0000012")
    train_gpt.main([*run, "--batch_size=8", "--tokens=768", "--accept_changes"])
    assert max(series(tmp_path / "run", "tokens").items()) == (10, 768)


def test_a_new_budget_may_not_make_the_learning_rate_jump(arguments, capsys):
    """The decay of 12 steps begins at step 9.2: a later budget continues step 8 and refuses step 12."""
    wsd = [*arguments, "--shape=wsd", "--wsd_decay=0.3"]
    run_in_process(wsd)
    message = stops(wsd, "--steps=20")
    assert "the learning rate would jump at step 12 from 0.0001 to 0.01, because" in message
    assert "the budget of 12 steps becomes 20" in message
    shutil.rmtree((folder_of(arguments) / FINAL).parent)
    run_in_process(wsd, "--steps=20")
    rates = series(folder_of(arguments), "lr")
    assert rates[12] == rates[8] == 0.01
    assert rates[20] < 0.004


def train_on_a_broken_disk(arguments):
    """From step 7 on, the rank with the last sequence gets EIO."""
    batch = TrainLoader.batch

    def broken(self, step):
        if step >= 7 and self.rows.stop == 12:
            raise DataError("train_000000.bin: Input/output error")
        return batch(self, step)

    TrainLoader.batch = broken
    train_gpt.main(arguments)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "mars_m --optim.is_approx=false"])
def test_tokens_that_cannot_be_read_any_more_cost_no_step(arguments, tmp_path, processes, optimizer):
    """From step 7 on, one rank gets EIO. The steps before are saved, and the error names the file."""
    arguments = [*arguments, "--micro_batch=3", *f"--optimizer={optimizer}".split()]
    output, _ = (run := Forked(train_on_a_broken_disk, arguments, processes=processes)).communicate(timeout=120)
    assert run.returncode == 1
    assert output.count("train_gpt: train_000000.bin: Input/output error") == 1
    last = max(series(folder_of(arguments)))
    assert 5 <= last <= 7
    assert (folder_of(arguments) / "checkpoints" / f"step_{last:07d}").exists()


def test_validation_that_cannot_be_read_costs_no_step(arguments, monkeypatch):
    def broken(self, number, step):
        raise DataError("val_000000.bin: Input/output error")

    monkeypatch.setattr(train_gpt.ValidationSet, "batch", broken)
    message = stops(arguments, "--eval_every=6", "--checkpoint.every=100")
    assert message == "train_gpt: val_000000.bin: Input/output error"
    assert [p.name for p in (folder_of(arguments) / "checkpoints").iterdir()] == ["step_0000006"]


def test_zeros_in_a_validation_shard_are_named(arguments, tmp_path):
    """Header, size and ids are good, and the losses would be wrong. A manifest has the hash of the shard."""
    data = make_dataset(tmp_path / "tokens")
    put_zeros(data / "val_000000.bin")
    assert "val_000000.bin: its sha256 is not the manifest's" in stops([*arguments, f"--data.path={data}"])
    assert not folder_of(arguments).exists()


def test_zeros_in_a_validation_shard_without_a_manifest_are_another_measure(arguments, tmp_path):
    make_tokens(3000).tofile(tmp_path / "train.bin")
    make_tokens(3000, seed=1).tofile(tmp_path / "val.bin")
    changed = [*arguments, f"--data.path={tmp_path}"]
    folder = run_in_process(changed)
    put_zeros(tmp_path / "val.bin")
    run_in_process(changed, "--name=other")
    one, two = (read_metrics(f / "metrics.jsonl") for f in (folder, folder.with_name("other")))
    assert one[-1]["measured_on"]["data"] != two[-1]["measured_on"]["data"]
    assert [r["loss"] for r in one if "loss" in r] == [r["loss"] for r in two if "loss" in r]


def put_zeros(path: Path):
    with open(path, "r+b") as f:
        f.seek(2000)
        f.write(bytes(1000))


def test_a_run_does_not_write_through_a_link_that_somebody_put_into_its_folder(arguments, tmp_path):
    thesis, table = tmp_path / "thesis.txt", folder_of(arguments) / "parameters.txt"
    thesis.write_text("years of work")
    table.parent.mkdir(parents=True)
    table.symlink_to(thesis)
    run_in_process(arguments, "--steps=4")
    assert thesis.read_text() == "years of work"
    assert table.read_text().startswith("tensor\tshape\t")


def test_fresh_starts_over_and_keeps_the_old_run(arguments, straight):
    shutil.copytree(straight, folder_of(arguments))
    run_in_process(arguments, "--fresh", "--seed=5")
    (old,) = folder_of(arguments).parent.glob("run.before-*")
    assert_same_weights(old / FINAL, straight / FINAL)
    assert series(folder_of(arguments)) != series(straight)


# ---- several processes


def test_two_processes_equal_one_and_continue_each_other(dataset, tmp_path):
    """The same global batches: a run on one process continued on two, and on two continued on one."""
    changes = ["--dropout=0", "--micro_batch=2"]
    common = [str(CONFIG), f"--data.path={dataset}", "--name=run", *changes]
    folders = {name: tmp_path / name for name in ("one", "two", "mixed")}
    run_in_process([*common, f"--log.folder={folders['one']}"])
    finish(launch([*common, f"--log.folder={folders['two']}"], 2))
    run_in_process([*common, f"--log.folder={folders['mixed']}"])
    shutil.rmtree(folders["mixed"] / "run/checkpoints/step_0000012")
    assert "continuing at step 8" in finish(launch([*common, f"--log.folder={folders['mixed']}"], 2))
    reference = load_file(folders["one"] / "run" / FINAL)
    for name in ("two", "mixed"):
        assert series(folders[name] / "run") == pytest.approx(series(folders["one"] / "run"), abs=2e-5)
        for key, weights in load_file(folders[name] / "run" / FINAL).items():
            torch.testing.assert_close(weights, reference[key], atol=2e-5, rtol=1e-3)
    first = read_metrics(folders["mixed"] / "run" / "metrics.jsonl")
    assert [r["step"] for r in first if "loss" in r] == list(range(1, 13))


def test_processes_that_fail_together_print_one_line(arguments, tmp_path):
    process = launch([*arguments, f"--data.path={tmp_path / 'nowhere'}"], 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert output.count("nowhere: not found") == 1


def test_a_process_that_fails_alone_prints_its_line(monkeypatch):
    waits = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit, match="program: a reason"), one_line("program"):
        raise UserError("a reason")
    assert waits == [5]


# ---- what stops a run, in one line and without loss


def stops(arguments, *more) -> str:
    with pytest.raises(SystemExit) as caught:
        train_gpt.main([*arguments, *more])
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_bad_input_is_answered_in_one_line(arguments, tmp_path):
    assert "dataset folder /nowhere: not found; prepare one" in stops(arguments, "--data.path=/nowhere")
    assert "does not fit vocab_size=30" in stops(arguments, "--vocab_size=30")
    assert "use a smaller --block_size or more text" in stops(arguments, "--block_size=16000")
    assert "config: optim.lr=-1.0: must be a number of at least 0\nconfig: steps=0" in stops(
        arguments, "--lr=-1", "--steps=0"
    )
    assert "config: dropout: expected --key=value" in stops(arguments, "dropout")
    assert "argument --fresh: ignored explicit argument 'true'" in stops(arguments, "--fresh=true")
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(arguments):
    assert "GPU 0 was asked for" in stops(arguments, "--device=cuda")
    assert 'device="gpu": must be "auto", "cpu", "cuda"' in stops(arguments, "--device=gpu")


def test_an_unwritable_run_folder(arguments, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    message = stops(arguments, f"--log.folder={tmp_path}/file")
    assert f"run folder {tmp_path}/file/run: File exists; choose another with --log.folder" in message
    message = stops(arguments, "--preflight", f"--log.folder={tmp_path}/file")
    assert f"{tmp_path}/file cannot be written into; choose another with --log.folder" in message


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(arguments, straight):
    shutil.copytree(straight, folder_of(arguments))
    message = stops(arguments, "--n_embd=32", "--lr=0.5", "--log.every=3")
    assert "model.n_embd: 16 -> 32" in message
    assert "optim.lr: 0.01 -> 0.5" in message
    assert "log.every" not in message
    assert "--fresh" in message
    assert_same_weights(folder_of(arguments) / FINAL, straight / FINAL)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(arguments, straight, capsys):
    shutil.copytree(straight, folder_of(arguments))
    path = folder_of(arguments) / FINAL
    os.truncate(path, path.stat().st_size // 2)
    run_in_process(arguments)
    captured = capsys.readouterr()
    assert "step_0000012 is damaged (model.safetensors does not match its sha256)" in captured.err
    assert "continuing at step 8" in captured.out
    assert_same_weights(path, straight / FINAL)
    assert series(folder_of(arguments)) == series(straight)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(arguments, straight, monkeypatch, capsys):
    """Step 8 cannot be written; training continues, step 4 is still there, step 12 is saved."""
    save, refused = Checkpointer.save, []

    def full_at_8(self, model, optimizer, state, average):
        if state["step"] == 8:
            limit_file_size(1000)
            refused.append(state["step"])
        try:
            save(self, model, optimizer, state, average)
        finally:
            limit_file_size(None)

    monkeypatch.setattr(Checkpointer, "save", full_at_8)
    folder = run_in_process(arguments)
    assert refused == [8]
    assert "checkpoint of step 8 could not be written" in capsys.readouterr().out
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_0000004", "step_0000012"]
    assert_same_weights(folder / FINAL, straight / FINAL)


def test_a_disk_full_at_the_end_is_an_error_and_said_once(arguments, monkeypatch, capsys):
    save, steps = Checkpointer.save, []

    def full_at_12(self, model, optimizer, state, average):
        steps.append(state["step"])
        limit_file_size(1000 if state["step"] == 12 else None)
        try:
            save(self, model, optimizer, state, average)
        finally:
            limit_file_size(None)

    monkeypatch.setattr(Checkpointer, "save", full_at_12)
    assert "stops at step 12 without its last checkpoint" in stops(arguments)
    assert steps == [4, 8, 12]
    assert capsys.readouterr().out.count("could not be written") == 1
    assert "step_0000008" in {p.name for p in (folder_of(arguments) / "checkpoints").iterdir()}


def write_through(monkeypatch, before):
    """Let `before(step)` run on the writer before each file of a checkpoint."""
    write = checkpoint.write_tensors

    def patched(path, tensors):
        before(int(path.parent.name[-7:]))
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", patched)


def test_training_goes_on_while_a_checkpoint_is_written(arguments, straight, monkeypatch, capsys):
    """Step 4's files wait for step 7, which a run that waits for them never reaches; the bytes are those of one."""
    reached, update = threading.Event(), train_gpt.Trainer.update
    monkeypatch.setattr(train_gpt.Trainer, "update", lambda t: (update(t), reached.set() if t.step == 8 else None))

    def wait(step):
        assert step > 4 or reached.wait(60)
        assert threading.current_thread() is not threading.main_thread()

    write_through(monkeypatch, wait)
    folder = run_in_process(arguments, "--checkpoint.background=true", "--checkpoint.keep=3")
    lines = capsys.readouterr().out.splitlines()
    place = {line.split("/")[-1]: i for i, line in enumerate(lines) if line.startswith("saved ")}
    assert list(place) == ["step_0000004", "step_0000008", "step_0000012"]
    assert place["step_0000004"] > next(i for i, line in enumerate(lines) if line.startswith("step      7/12"))
    for step in (4, 8, 12):
        (state,) = (folder / "checkpoints" / f"step_{step:07d}").glob("state.json")
        assert json.loads(state.read_text())["step"] == step
    for path in [p for p in straight.glob("checkpoints/*/*") if p.suffix == ".safetensors"]:
        assert path.read_bytes() == (folder / path.relative_to(straight)).read_bytes()
    assert series(folder) == series(straight)


def test_a_record_that_is_written_one_step_late_is_the_same(arguments, straight, monkeypatch):
    """As on a GPU: nothing waits for the numbers of a step until the next one is on its way."""
    init, update, written = GradientClipper.__init__, train_gpt.Trainer.update, []

    def look(t):
        path = t.folder / "metrics.jsonl"
        written.append(max(series(t.folder)) if path.exists() else 0)
        update(t)

    monkeypatch.setattr(GradientClipper, "__init__", lambda *args: init(*args, late=True))
    monkeypatch.setattr(train_gpt.Trainer, "update", look)
    folder = run_in_process(arguments)
    assert written[:4] == [0, 0, 1, 2]
    assert written[4] == 4  # evaluated and saved, so all of its numbers are known
    assert series(folder) == series(straight)
    assert series(folder, "grad_norm") == series(straight, "grad_norm")


def train_with_another_bit_on_rank_1(arguments):
    update = train_gpt.Trainer.update

    def changed(trainer):
        update(trainer)
        if os.environ["RANK"] == "1" and trainer.step == 6:
            trainer.model.transformer.wpe.weight.data.view(torch.int32)[0, 0] ^= 1

    train_gpt.Trainer.update = changed
    train_gpt.main(arguments)


def test_replicas_that_differ_in_one_bit_are_reported_at_the_next_checkpoint(arguments):
    output = finish(Forked(train_with_another_bit_on_rank_1, [*arguments, "--checkpoint.every=4"], processes=2))
    before, told, _ = output.partition("warning: the weights of rank 1 differ from those of rank 0")
    assert told
    assert "saved" in before  # step 4 was equal
    assert "step_0000008" not in before


@pytest.mark.parametrize("full_at", [8, 12])
def test_a_full_disk_during_a_background_write_is_reported_and_training_continues(
    arguments, monkeypatch, capsys, full_at
):
    def full(step):
        if step == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_through(monkeypatch, full)
    arguments = [*arguments, "--checkpoint.background=true"]
    if full_at == 12:
        assert "stops at step 12 without its last checkpoint" in stops(arguments)
    else:
        run_in_process(arguments)
    assert f"checkpoint of step {full_at} could not be written: [Errno 28]" in capsys.readouterr().out
    left = {p.name for p in (folder_of(arguments) / "checkpoints").iterdir()}
    assert left == {f"step_{step:07d}" for step in {4, 8, 12} - {full_at}}


def test_a_signal_waits_for_the_writer(arguments, monkeypatch, capsys):
    """SIGTERM comes while step 4 is written, and again while the last checkpoint is; both take their time."""
    threads = set()

    def slow(step):
        threads.add(threading.current_thread())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    write_through(monkeypatch, slow)
    monkeypatch.setattr("runtime.distributed.REPEATED", 600)  # on a slow machine, the signals may be seconds apart
    folder = run_in_process(arguments, "--checkpoint.background=true", "--steps=10000")
    captured = capsys.readouterr()
    stopped = max(series(folder))
    assert f"stopped at step {stopped} of 10000" in captured.out
    assert stopped < 10000
    saved = {p.name for p in (folder / "checkpoints").iterdir()}
    assert saved == {"step_0000004", f"step_{stopped:07d}"}
    assert threading.main_thread() not in threads


def limit_file_size(limit: int | None):
    """Let writes fail as on a full disk once a file would pass `limit` bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))


@pytest.mark.parametrize("optimizer, background", [("adamw", "false"), ("mars_m", "true")])
def test_a_loss_that_is_not_finite_stops_before_the_update(arguments, optimizer, background, monkeypatch):
    """Sequence 5 of step 9 poisons the gradient: the run names both, and step 8's checkpoint is the last.

    In the background, that checkpoint is still being written by then.
    """
    poisoned, struck = {}, threading.Event()
    write_through(monkeypatch, lambda step: step < 8 or background == "false" or struck.wait(60))
    forward = GPT.forward

    def poison(self, idx, targets=None):
        loss = forward(self, idx, targets)
        if targets is not None and (idx == poisoned["row"]).all(dim=1).any():
            struck.set()
            loss = loss * float("nan")
        return loss

    run = load_config(CONFIG, arguments[1:])
    loader = TrainLoader(
        open_dataset(run.data.path, VOCAB), run.data, block_size=16, batch_size=12, vocab_size=VOCAB, seed=run.seed
    )
    poisoned["row"] = torch.from_numpy(loader.batch(9)[5, :-1].astype(np.int64))
    shard, offset = loader.windows.locate(loader.window_ids(9)[5])
    monkeypatch.setattr(GPT, "forward", poison)
    arguments = [*arguments, f"--optimizer={optimizer}", f"--checkpoint.background={background}"]
    message = stops(arguments)
    assert "the gradient of step 9 (counted from 0) is not finite; earlier checkpoints are good" in message
    assert message.endswith(f"sequences: {shard.path.name}@{offset}")
    saved = sorted(p.name for p in (folder_of(arguments) / "checkpoints").iterdir())
    assert saved == ["step_0000004", "step_0000008"]
    monkeypatch.undo()
    run_in_process(arguments)  # the checkpoint is good: without the poison the run ends as if nothing had happened
    continued = load_file(folder_of(arguments) / FINAL)
    run_in_process(arguments, "--fresh")
    straight = load_file(folder_of(arguments) / FINAL)
    assert all(torch.equal(continued[name], straight[name]) for name in straight)


def test_sequences_are_named_by_the_last_checkpoint_if_the_update_has_spoilt_the_weights(arguments):
    """On a GPU, a gradient that is not finite is seen after its update."""
    run = load_config(CONFIG, [*arguments[1:], "--steps=8"])
    t = train_gpt.Trainer(run, ALONE, fresh=False)
    spoil(t.model)
    assert t.bad_samples(9) == "; sequences: unknown, because the weights are lost and there is no checkpoint"
    run_in_process(arguments, "--steps=8")
    t = train_gpt.Trainer(run, ALONE, fresh=False)
    spoil(t.model)
    assert t.bad_samples(9).startswith("; sequences: no single one has a loss that is not finite")


def spoil(model):
    for p in model.parameters():
        p.detach().fill_(float("nan"))


def test_weights_that_overflow_in_the_last_step_are_not_saved(arguments):
    message = stops(arguments, "--steps=4", "--checkpoint.every=3", "--lr=1000")
    assert "the validation loss of step 4 is not finite; this step is not saved" in message
    assert [p.name for p in (folder_of(arguments) / "checkpoints").iterdir()] == ["step_0000003"]


@pytest.mark.parametrize("owner, when", [(train_gpt, "fitting_micro_batch"), (train_gpt.Trainer, "restore")])
def test_ctrl_c_before_the_loop_is_one_line(arguments, monkeypatch, owner, when):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, when, interrupt)
    assert "interrupted. Run the same command to resume from the last checkpoint" in stops(
        arguments, "--micro_batch=auto"
    )


def test_usage_and_help(capsys):
    assert "usage: train_gpt.py CONFIG" in stops([])
    train_gpt.main([str(CONFIG), "--help"])
    assert "--optim.lr=0.01  peak learning rate" in capsys.readouterr().out
    train_gpt.main(["--help"])
    assert "usage: train_gpt.py CONFIG" in capsys.readouterr().out


def test_from_the_command_line_errors_are_one_line(dataset):
    command = [sys.executable, "train_gpt.py", str(CONFIG), f"--data.path={dataset}", "--n_heads=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout + done.stderr == "config: n_heads: unknown key; nearest: model.n_head, model.n_embd\n"
    process = launch([str(CONFIG), f"--data.path={dataset}", "--n_heads=3"], processes=2)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert output.count("config: n_heads: unknown key") == 1


def test_shards_that_get_a_manifest_midway_are_accepted_as_a_change(tmp_path):
    """`data.prepare pretokenized --source` does so."""
    raw = tmp_path / "raw"
    raw.mkdir()
    make_tokens(3000).tofile(raw / "train.bin")
    make_tokens(500).tofile(raw / "val.bin")
    arguments = [str(CONFIG), f"--data.path={raw}", f"--log.folder={tmp_path / 'runs'}", "--name=run"]
    arguments.append(f"--vocab_size={VOCAB}")  # else that of the manifest's tokenizer
    train_gpt.main(arguments)
    shutil.rmtree((folder_of(arguments) / FINAL).parent)
    index_in_place(raw)
    assert "--accept_changes continues it" in stops(arguments)
    train_gpt.main([*arguments, "--accept_changes"])
    assert len(series(folder_of(arguments))) == 12


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '"x"'])
def test_a_config_json_that_somebody_damaged_is_named(arguments, straight, content):
    shutil.copytree(straight, folder_of(arguments))
    path = folder_of(arguments) / "config.json"
    path.write_text(content)
    assert stops(arguments) == f"train_gpt: {path} is not readable; repair it, or start over with --fresh"


def test_a_setting_of_another_version_is_named_and_the_run_continues(arguments, straight, capsys):
    shutil.copytree(straight, folder_of(arguments))
    path = folder_of(arguments) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"future": {"key": 1}}))
    train_gpt.main(arguments)
    assert "note: future.key: this version has no such setting; the run started with it" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["another weight", "another state"])
def test_a_checkpoint_of_a_newer_version_is_one_line(arguments, straight, kind):
    shutil.copytree(straight, folder_of(arguments))
    for folder in (folder_of(arguments) / "checkpoints").iterdir():
        name = "model.safetensors" if kind == "another weight" else "optimizer-0.safetensors"
        tensors = load_file(folder / name)
        first = next(iter(tensors))
        tensors["transformer.new.weight" if kind == "another weight" else f"{first}_new"] = torch.ones(2)
        (folder / name).unlink()
        digest = write_tensors(folder / name, tensors)
        change_state(folder, sha256=json.loads((folder / "state.json").read_text())["sha256"] | {name: digest})
    message = stops(arguments)
    assert re.match(
        r"train_gpt: checkpoint \S+/checkpoints/step_0000012: .*new.*; another version of the program", message
    )
    assert "\n" not in message


def test_a_bug_in_a_users_optimizer_keeps_its_traceback(dataset, tmp_path):
    """The error class is one that a wrong setting has, too; file and line say where to look."""
    program = """
from dataclasses import dataclass
from torch.optim import SGD
from optimizers import Settings
from tests.tiny_config import config, optimizers

class Mine(SGD):
    def step(self):
        first, second = self.param_groups[0]["params"], 3, 4

@dataclass(frozen=True)
class MineConfig(Settings):
    lr: float = 0.1
    weight_decay: float = 0.0

    def build(self, assignments, *_):
        return Mine([a.param for a in assignments], lr=self.lr)

optimizers = {"mine": MineConfig()}
"""
    (tmp_path / "mine.py").write_text(program)
    places = [f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", "--optimizer=mine"]
    output, _ = (process := launch([str(tmp_path / "mine.py"), *places])).communicate(timeout=120)
    assert process.returncode == 1
    assert "ValueError: too many values to unpack (expected 2)" in output
    assert f'File "{tmp_path / "mine.py"}", line 9, in step' in output


def test_another_optimizer_cannot_continue_a_state_and_says_so(arguments, straight):
    shutil.copytree(straight, folder_of(arguments))
    message = stops(arguments, "--optimizer=lion", "--accept_changes")
    assert "its optimizer is adamw; --init_from starts a new run with the weights alone" in message
    assert_same_weights(folder_of(arguments) / FINAL, straight / FINAL)


def test_outside_of_the_main_thread_nothing_is_made(arguments, tmp_path):
    failures = []

    def start():
        try:
            train_gpt.main(arguments)
        except SystemExit as error:
            failures.append(error.code)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "start it in a process of its own" in failures[0]
    assert not folder_of(arguments).exists()


def test_a_damaged_token_names_the_command_that_finds_it(arguments, tmp_path):
    data = make_dataset(tmp_path / "tokens")
    with open(data / "train_000000.bin", "r+b") as f:
        f.seek(1024)
        f.write(b"\xff" * 2 * 10_000)
    message = stops([*arguments, f"--data.path={data}"])
    assert "token 65535 at offset" in message
    assert (
        f"the shard is damaged, or the setting is not that of its tokenizer: python -m data.prepare verify {data}"
        in message
    )


def test_a_learning_rate_that_is_too_large_is_named_as_the_cause(arguments):
    assert stops(arguments, "--lr=1e30", "--steps=8").endswith("so a smaller --lr may help")


def test_nanogpt_files_train(tmp_path):
    make_tokens(3000).tofile(tmp_path / "train.bin")
    make_tokens(500).tofile(tmp_path / "val.bin")
    train_gpt.main([str(CONFIG), f"--data.path={tmp_path}", f"--log.folder={tmp_path / 'runs'}"])
    assert series(next((tmp_path / "runs").iterdir())).keys() == set(range(1, 13))
