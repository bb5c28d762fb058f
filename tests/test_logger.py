"""metrics.jsonl, the meter, and backends that may fail."""

import io
import json
import os
import resource
import signal
import sys
import time
import types
from dataclasses import replace

import pytest

from runtime.distributed import ALONE
from training.logger import LogConfig, Meter, MetricsFile, RunLogger, read_metrics, record_in
from training.plot import plot_run


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


def test_the_id_of_a_wandb_page_is_complete_or_absent(tmp_path, monkeypatch, capsys):
    """Half an id, or an empty one, would be another page at every later start."""

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", fails)
        logger(tmp_path, wandb="offline").close()
    assert "wandb failed" in capsys.readouterr().out
    assert not (tmp_path / "wandb_id").exists()


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


def wandb_run(log=lambda *a, **k: None, define_metric=lambda *a, **k: None):
    return types.SimpleNamespace(log=log, finish=lambda: None, define_metric=define_metric)


def fake_wandb(monkeypatch, init):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


def test_wandb_online_without_a_network_falls_back_to_offline(tmp_path, monkeypatch, capsys):
    modes = []

    def init(mode, **settings):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route")
        return wandb_run()

    fake_wandb(monkeypatch, init)
    logger(tmp_path, wandb="online").close()
    assert modes == ["online", "offline"]
    assert "wandb (online) did not start: no route" in capsys.readouterr().out


def test_wandb_plots_over_tokens_keeps_the_best_loss_and_groups_seeds(tmp_path, monkeypatch):
    defined, given = {}, {}
    define = lambda name, **how: defined.update({name: how})  # noqa: E731
    fake_wandb(monkeypatch, lambda **settings: given.update(settings) or wandb_run(define_metric=define))
    RunLogger(tmp_path, LogConfig(wandb="online"), {}, "small-mars-owt-1B-lr0.01-seed3", 10, 0, ALONE).close()
    assert defined["*"] == {"step_metric": "tokens"}
    assert defined["val_loss"]["summary"] == "min"
    assert given["group"] == "small-mars-owt-1B-lr0.01"


@pytest.mark.parametrize("value", ["true", "1", "yes"])
def test_wandb_disabled_in_the_environment_is_off(tmp_path, monkeypatch, value):
    fake_wandb(monkeypatch, lambda **settings: pytest.fail("started"))
    monkeypatch.setenv("WANDB_DISABLED", value)
    logger(tmp_path, wandb="online").close()


def test_wandb_follows_its_own_environment_variables(tmp_path, monkeypatch):
    given = {}
    fake_wandb(monkeypatch, lambda **settings: given.update(settings) or wandb_run())
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

    fake_wandb(monkeypatch, lambda **settings: wandb_run(log=log))
    run = logger(tmp_path, wandb="online")
    run.record({"step": 1, "loss": 2.0}, "")
    run.record({"step": 2, "loss": 1.0}, "")
    run.close()
    assert capsys.readouterr().out.count("wandb failed (backend gone); training continues without it") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_records_wait_until_they_can_be_written(tmp_path, capsys):
    """The folder cannot be written for two records, then it can; afterwards somebody deletes the file."""
    run, path = logger(tmp_path), tmp_path / "metrics.jsonl"
    run.record({"step": 1}, "")
    path.rename(tmp_path / "away")
    path.mkdir()
    run.record({"step": 2}, "")
    run.record({"step": 3}, "")
    path.rmdir()
    (tmp_path / "away").rename(path)
    run.record({"step": 4}, "")
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    path.unlink()
    run.record({"step": 5}, "")
    run.close()
    assert [r["step"] for r in read_metrics(path)] == [5]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: Is a directory; its records wait in memory until they can be written") == 1
    assert said.count("metrics.jsonl: all records are written now") == 1
    assert run.lost == ""


def test_a_disk_that_is_full_in_the_middle_of_a_record_leaves_no_part_of_it(tmp_path):
    """30 bytes fit, and later all. A line that another program has cut is ended first."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limit[1]))
    try:
        for step in (1, 2, 3):
            file.record({"step": step, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in file.problem
    assert file.path.read_text() == '{"step": 1, "loss": 0.25}\n'
    with open(file.path, "a") as f:
        f.write('{"ste')
    assert file.record({"step": 4, "loss": 0.25}).endswith("all records are written now")
    assert [r["step"] for r in read_metrics(file.path)] == [1, 2, 3, 4]
    assert file.close() == ""


def test_records_that_are_lost_at_the_end_are_an_error(tmp_path):
    run = logger(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    run.record({"step": 1}, "")
    run.close()
    assert run.lost.endswith("metrics.jsonl: the last 1 records could not be written (Is a directory)")


def test_json_nested_without_end_is_no_record():
    assert record_in(b"[" * 100_000) is None


def test_unreadable_lines_are_counted_and_kept(tmp_path, capsys):
    lines = ['{"step": 1}', "\x00\x00", '{"st', '{"step": 2}', '{"step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    logger(tmp_path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "metrics.unreadable").read_text() == '\x00\x00\n{"st\n'
    assert "2 lines are not records; they are in metrics.unreadable now" in capsys.readouterr().out


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
