"""Devices, gradient clipping, and the run folder."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from conftest import ROOT, environment
from torch._inductor.async_compile import AsyncCompile

from optimizers import AdamWConfig, build_optimizer
from runtime import distributed, hardware
from runtime.distributed import ALONE, resolve_device, start_world
from training.clipping import GradientClipper, NonFiniteError
from training.compute import start_compile_workers
from training.console import aligned
from training.folder import RunFolderError, compare_settings, differences, run_lock, write_settings


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA H20", 148),
        ("NVIDIA A10", 125),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Somebody's GPU", None),
    ],
)
def test_peak_by_device_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = hardware.peak_flops(torch.device("cuda", 0))
    assert peak == (tflops * 1e12 if tflops else None)


def test_a_cpu_has_no_peak_and_a_resident_size():
    assert hardware.peak_flops(torch.device("cpu")) is None
    assert 0.05 < hardware.memory_gb(torch.device("cpu")) < 100


def test_the_environment_names_versions_and_device(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")  # the version of the package may lack the build
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_gpt.py", "config/my run.py", "--seed=2"])
    facts = hardware.environment(torch.device("cpu"), 2)
    assert facts["command"] == "python train_gpt.py 'config/my run.py' --seed=2"
    assert facts["packages"]["torch"] == "2.99.0+cu130"
    assert facts["processes"] == 2
    json.dumps(facts)


def test_devices_that_do_not_exist_are_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 0)
    assert resolve_device("cuda", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="GPU 2 was asked for, but torch .* sees 2; use --device=cpu, or fewer"):
        resolve_device("cuda", local_rank=2)
    for name in ("tpu", "mps", "gpu:0"):
        with pytest.raises(ValueError, match=f'device="{name}": must be "auto"'):
            resolve_device(name)


def test_a_process_that_sees_one_gpu_uses_it_whatever_its_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda", local_rank=3) == torch.device("cuda", 0)


def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_a_run_on_the_cpu(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)  # a CPU build
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="nvidia-smi lists .*A100.* the driver is too old for CUDA 13.0"):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert resolve_device("auto") == torch.device("cpu")


def test_compilation_without_a_c_compiler_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="needs a C compiler, and there is none: install gcc"):
        start_compile_workers(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number):
    """As SIGINT in a background job of a shell script, and SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = distributed.StopRequest(ALONE)
        stop.let_steps_finish()
        os.kill(os.getpid(), number)
        assert not stop.agreed()
        stop.close()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_programs_that_a_run_starts_outlive_the_signals_that_stop_it():
    """As the C++ compiler, when a scheduler signals the whole process group."""
    stop = distributed.StopRequest(ALONE)
    child = subprocess.Popen(["sleep", "0.5"])
    child.terminate()
    assert child.wait() == 0
    stop.close()
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    assert child.wait() == -signal.SIGTERM


def test_compile_workers_ignore_the_signals_that_stop_a_run():
    """If a signal to the process group killed a worker, the trainer would wait for its result for ever."""
    program = """if True:
        import os
        from pathlib import Path
        from training.compute import start_compile_workers
        start_compile_workers(1)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        lines = [line.split() for c in children for line in open(f"/proc/{c}/status")]
        print(*(line[1] for line in lines if line[0] == "SigIgn:"))"""
    env = environment() | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    masks = [int(mask, 16) for mask in done.stdout.split()]
    assert masks, done.stderr
    for number in distributed.StopRequest.SIGNALS:
        assert all(mask >> (number - 1) & 1 for mask in masks), number


@pytest.mark.parametrize("processes, workers", [(1, 32), (8, 8), (128, 1)])
def test_the_processes_of_a_machine_divide_its_cores_among_their_compile_workers(monkeypatch, processes, workers):
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(AsyncCompile, "warm_pool", lambda: None)
    with inductor.patch(compile_threads=32):  # the most that Inductor starts
        start_compile_workers(processes)
        assert inductor.compile_threads == workers


@pytest.mark.parametrize("steps", [0, 1])
def test_a_signal_before_the_first_step_and_a_second_one_later_end_a_process_that_waits_in_a_library(steps):
    program = f"""if True:
        import ctypes
        from runtime.distributed import StopRequest, World
        stop = StopRequest(World(0, 1, None))
        for step in range({steps}):
            stop.let_steps_finish()
        print("waits", flush=True)
        mutex = ctypes.create_string_buffer(64)  # zeros are an unlocked mutex; the second locking waits for ever
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    if steps:
        time.sleep(distributed.REPEATED + 0.2)
        assert process.poll() is None
        process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("SIGTERM again" if steps else "SIGTERM: received before the first step")


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with start_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather("x") == ["x"]
        assert world.sum(torch.ones(2)).tolist() == [1, 1]


def test_a_process_knows_how_many_share_its_machine(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    facts = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=8, MASTER_ADDR="localhost", MASTER_PORT=port)
    for name, value in facts.items():
        monkeypatch.setenv(name, str(value))
    with start_world("cpu") as world:
        assert (world.rank, world.size, world.local_size) == (0, 1, 8)


@pytest.mark.parametrize(
    "device, failure, destroyed",
    [("cuda", None, 1), ("cuda", torch.OutOfMemoryError, 0), ("cuda", SystemExit, 1), ("cpu", ValueError, 1)],
)
def test_a_rank_that_fails_on_a_gpu_does_not_wait_for_the_others(monkeypatch, device, failure, destroyed):
    """NCCL's shutdown is collective: after an error the process ends without it, so that the error is printed."""
    calls = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "resolve_device", lambda *a: torch.device(device, 0))
    monkeypatch.setattr(distributed, "Roll", lambda *a: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    options = {}

    def record(name, *arguments, **keywords):
        calls.append((name, *arguments))
        options[name] = keywords

    for name in ("init_process_group", "new_group", "get_rank", "get_world_size", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, partial(record, name))
    with pytest.raises(failure) if failure else nullcontext(), start_world(device):
        if failure:
            raise failure
    assert options["new_group"]["timeout"] <= options["init_process_group"]["timeout"] <= timedelta(minutes=10)
    assert calls[0] == ("init_process_group", "nccl" if device == "cuda" else "gloo")
    assert calls.count(("destroy_process_group",)) == destroyed


def small():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    model.parameter_roles = lambda: {"weight": "matrix", "bias": "vector"}
    return model, build_optimizer(model, AdamWConfig(lr=0.1))


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_equals_clip_grad_norm(scale):
    (one, first), (two, second) = small(), small()
    clipper = GradientClipper(one, max_norm=1.0)
    for step in range(5):
        for model in (one, two):
            model.zero_grad()
            (model(torch.full((2, 4), float(step + 1))).pow(2).sum() * scale).backward()
        norm = clipper.clip(step)
        expected = torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
        torch.testing.assert_close(norm, expected)
        first.step()
        second.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_bad_gradient_stops_the_run_before_it_is_applied():
    model, optimizer = small()
    clipper = GradientClipper(model, max_norm=1.0)
    with pytest.raises(NonFiniteError, match="the gradient of step 3 .* is not finite; earlier checkpoints") as caught:
        for step in range(6):
            model.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            if step == 3:
                model.bias.grad[0] = float("nan")
                before = model.weight.detach().clone()
            clipper.clip(step)
            optimizer.step()
    assert torch.equal(model.weight, before)
    assert caught.value.step == 3


def test_a_norm_that_is_looked_at_late_is_seen_one_call_later_or_by_check():
    """As on a GPU, where the host must not wait. Nothing may be saved before `check` has seen every norm."""
    for seen_by_check in (True, False):
        model, _ = small()
        clipper = GradientClipper(model, max_norm=1.0, late=True)
        for step in range(4):
            model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.full((3,), math.nan if step == 3 else 1.0)
            clipper.clip(step)
            if step < 3:
                clipper.check()
        with pytest.raises(NonFiniteError, match="the gradient of step 3") as caught:
            clipper.check() if seen_by_check else clipper.clip(4)
        assert caught.value.step == 3


def test_columns_are_as_wide_as_their_longest_entry():
    rows = [("tensor", "shape", "rule", "lr", "decay"), ("a" * 50, "1234567x1234567", "r" * 60, "0.0000001", "0.1")]
    lines = aligned(rows)
    assert len({len(line) for line in lines}) == 1
    assert [lines[0].index(word) for word in ("tensor", "rule")] == [lines[1].index(word) for word in ("aaa", "rrr")]


def test_a_run_folder_is_compared_before_anything_is_written(tmp_path):
    folder, run = tmp_path / "r", {"seed": 1, "optim": {"lr": 0.1}, "log": {"every": 1}}
    compare_settings(folder, run, set(), {}, ALONE)
    assert not folder.exists()
    write_settings(folder, run, {"device": "cpu"}, False, ALONE)
    compare_settings(folder, run | {"seed": 3}, set(), {}, ALONE)  # nothing is done yet
    (folder / "checkpoints" / "step_0000004").mkdir()
    with pytest.raises(RunFolderError, match="seed: 1 -> 2"):
        compare_settings(folder, run | {"seed": 2}, {"log.every"}, {}, ALONE)
    changed = run | {"log": {"every": 5}}
    compare_settings(folder, changed, {"log.every"}, {}, ALONE)
    assert json.loads((folder / "config.json").read_text()) == run
    write_settings(folder, changed, {}, False, ALONE)
    assert json.loads((folder / "config.json").read_text()) == changed
    (folder / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="config.json is not readable"):
        compare_settings(folder, run, set(), {}, ALONE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"):
        write_settings(tmp_path / "r", {}, {}, False, ALONE)


def test_differences_name_every_changed_key():
    before, now = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 4, "e": 6}}
    assert differences(before, now, {}) == {"b.c": (2, 5), "b.d": (3, 4), "b.e": (None, 6)}


def test_new_settings_had_their_defaults_and_removed_settings_are_ignored():
    before, now = {"a": 1, "removed": 7}, {"a": 1, "new": 0.2, "b": {"new": [0.9, 0.95]}}
    defaults = {"new": 0.2, "b.new": (0.9, 0.95)}
    assert differences(before, now, defaults) == {}
    assert differences(before, now | {"new": 0.3}, defaults) == {"new": (0.2, 0.3)}


def test_fresh_renames_every_earlier_run(tmp_path):
    for i in range(3):
        write_settings(tmp_path / "r", {"i": i}, {}, True, ALONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "r.before-1", "r.before-2"]


def test_a_link_to_nowhere_as_log_folder_is_named(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with (
        pytest.raises(RunFolderError, match="log.folder=.*runs: is a link to .*disk, which does not exist"),
        run_lock(tmp_path / "runs" / "r", ALONE),
    ):
        raise AssertionError("locked")


def test_a_link_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / ".r.lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(RunFolderError, match=r"/\.r\.lock: Too many levels"), run_lock(tmp_path / "r", ALONE):
        raise AssertionError("locked")
