"""metrics.jsonl, the meter, and backends that may fail."""

import io
import json
import sys
import time
import types
from dataclasses import replace

import pytest

from runtime.distributed import ALONE
from runtime.logger import LogConfig, Meter, RunLogger, read_metrics
from runtime.plot import plot_run


def logger(folder, resume_step=0, world=ALONE, **config):
    return RunLogger(folder, LogConfig(**config), {"lr": 1}, "name", steps=10, resume_step=resume_step, world=world)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("where", ["terminal", "torchrun", "file"])
def test_on_a_terminal_the_lines_of_steps_replace_each_other(tmp_path, monkeypatch, where):
    stream = io.StringIO() if where == "file" else Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    world = replace(ALONE, control="a process group") if where == "torchrun" else ALONE
    log = logger(tmp_path, world=world)
    for step in (5, 10):
        log.record({"step": step, "loss": 1.0}, f"step {step}")
    log.record({"step": 10, "val_loss": 1.0}, "validation")
    log.close()
    shown = stream.getvalue()
    if where == "terminal":
        assert "step 5\n" not in shown
        assert shown.rindex("100%") < shown.rindex("step 10")
    else:
        assert "\r" not in shown
        assert shown.startswith("step 5\nstep 10\n")
    assert "validation\n" in shown
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 10]


def test_records_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = logger(tmp_path)
    for step in range(1, 6):
        log.record({"step": step, "loss": 1 / step}, "")
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')  # cut off by a crash
    log = logger(tmp_path, resume_step=3)
    log.record({"step": 4, "loss": 9.0}, "")
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


def test_wandb_offline_gets_the_records_and_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = logger(tmp_path, wandb="offline", project="p")
    log.record({"step": 1, "loss": 2.0}, "")
    log.close()
    run_id = (tmp_path / "wandb_id").read_text()
    log = logger(tmp_path, resume_step=1, wandb="offline", project="p")
    log.close()
    assert (tmp_path / "wandb_id").read_text() == run_id
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))) >= 1


def fake_wandb(monkeypatch, init):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


def test_wandb_online_without_a_network_falls_back_to_offline(tmp_path, monkeypatch, capsys):
    modes = []

    def init(mode, **settings):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route")
        return types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)

    fake_wandb(monkeypatch, init)
    logger(tmp_path, wandb="online").close()
    assert modes == ["online", "offline"]
    assert "wandb (online) did not start: no route" in capsys.readouterr().out


def test_wandb_follows_its_own_environment_variables(tmp_path, monkeypatch):
    given = {}
    fake_wandb(monkeypatch, lambda **settings: given.update(settings) or types.SimpleNamespace(finish=lambda: None))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    logger(tmp_path, wandb="online", project="p").close()
    assert (given["mode"], given["project"]) == ("offline", "mine")
    given.clear()
    logger(tmp_path, wandb="disabled").close()
    assert not given


def test_tensorboard_gets_every_number_and_purges_what_a_resume_repeats(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            written.append((key, value, step))

        def flush(self):
            pass

        close = flush

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = logger(tmp_path, resume_step=1, tensorboard=True)
    log.record({"step": 2, "loss": 3.5, "lr": 0.1}, "")
    log.close()
    assert written[0] == (str(tmp_path / "tensorboard"), 2)
    assert set(written[1:]) == {("loss", 3.5, 2), ("lr", 0.1, 2)}


def test_a_run_without_tensorboard_installed_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger(tmp_path, tensorboard=True).close()
    assert "tensorboard failed (tensorboard is not installed (pip install tensorboard))" in capsys.readouterr().out


def test_a_wandb_error_during_a_run_does_not_stop_it(tmp_path, monkeypatch, capsys):
    def log(numbers, step):
        raise OSError("backend gone")

    fake_wandb(monkeypatch, lambda **settings: types.SimpleNamespace(log=log, finish=lambda: None))
    run = logger(tmp_path, wandb="online")
    run.record({"step": 1, "loss": 2.0}, "")
    run.record({"step": 2, "loss": 1.0}, "")
    run.close()
    assert capsys.readouterr().out.count("wandb failed (backend gone); training goes on without it") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_metrics_file_that_cannot_be_written_does_not_stop_a_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    run = logger(tmp_path)
    run.record({"step": 1, "loss": 2.0}, "")
    run.close()
    assert "metrics.jsonl failed (" in capsys.readouterr().out


def test_the_meter_excludes_evaluations_and_counts_waiting():
    meter = Meter(trained=100.0)
    time.sleep(0.02)
    with meter.waiting():
        time.sleep(0.02)
    with meter.excluded():
        time.sleep(0.2)
    numbers = meter.read(steps=2)
    assert 20 <= numbers["step_ms"] < 100
    assert 10 <= numbers["data_ms"] < 75
    assert numbers["train_s"] == pytest.approx(100 + 2 * numbers["step_ms"] / 1e3)
    assert meter.read(steps=1)["data_ms"] == 0


@pytest.mark.parametrize("steps", [1, 3])
def test_the_meter_leaves_the_first_step_out_of_a_mean_over_several(monkeypatch, steps):
    """The first step after a start compiles: here it takes 60 seconds, and each later one takes a second."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    for step in range(steps):
        now += 1 if step else 60
        meter.step_done()
    numbers = meter.read(steps)
    assert numbers["step_ms"] == (1000 if steps > 1 else 60_000)
    assert numbers["train_s"] == 60 + steps - 1
    now += 4
    assert meter.read(4)["step_ms"] == 1000


def test_the_meter_reports_speed_and_the_fraction_of_the_peak():
    meter = Meter(tokens=1000, flops=6e6, peak_flops=6e9)
    time.sleep(0.02)
    numbers = meter.read(steps=1)
    assert numbers["tokens_per_s"] == pytest.approx(1e6 / numbers["step_ms"])
    assert numbers["mfu"] == pytest.approx(1 / numbers["step_ms"])
    assert "mfu" not in Meter().read(steps=1)


def test_curves_need_only_the_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no metrics.jsonl in it"):
        plot_run(tmp_path)
    records = [dict(step=s, tokens=100 * s, loss=3 / s, lr=0.1, grad_norm=1.0) for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_errors_are_named():
    assert len(LogConfig(every=0, wandb="maybe").errors()) == 2
