"""The trainer and the optimizers on a GPU: a real one if torch finds it, and otherwise the null GPU.

`bash scripts/test_cuda.sh` runs these tests. The null GPU computes nothing, so only a real one checks numbers.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import null_gpu
import pytest
import torch
from conftest import ROOT, environment

from bench.runs import run_arguments
from optimizers import OPTIMIZERS
from training.logger import read_metrics

REAL = torch.cuda.is_available()
TIMEOUT = 1200  # seconds; two cores need minutes to compile a small model
# torch reads the status of SOAP's eigenvectors from memory that no kernel of the null GPU writes to. New memory is
# zero, which means success; memory that the allocator gives out again is not.
NEW_MEMORY = dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
GB = 10**9

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA"),
]

needs_two_gpus = pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="needs two GPUs")


def begin(*command: str, gpus: int = 1, memory: int | None = None, **more: str) -> subprocess.Popen:
    """Start cuda_programs.py in a process group of its own.

    With `memory`, in bytes, it runs on null GPUs even if there are real ones.
    """
    env = environment()
    if memory or not REAL:
        env |= null_gpu.environment(gpus, memory or 85 * GB)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launcher, "tests/cuda_programs.py", *command]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, env=env | more, text=True, start_new_session=True, **pipes)


def start(*command: str, **options) -> subprocess.CompletedProcess:
    """Run cuda_programs.py to its end."""
    process = begin(*command, **options)
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def output_of(*command: str, **options) -> str:
    """What a program prints; it must succeed."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result_of(*command: str, **options):
    """The result of a program, which is its last line."""
    return json.loads(output_of(*command, **options).splitlines()[-1])


@pytest.fixture
def on_gpu(arguments) -> list[str]:
    """Arguments of a tiny run of 12 steps on a GPU, eager."""
    return [*arguments, "--device=cuda", "--compile=false"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Arguments of a run with the width and the vocabulary of GPT-2 small and two layers, by further settings."""
    folder = tmp_path_factory.mktemp("wide")
    return lambda *settings: run_arguments(folder, "124M", False, "device=cuda", "n_layer=2", "steps=100", *settings)


def folder_of(arguments: list[str]) -> Path:
    """The run folder that the arguments of `on_gpu` name."""
    return next(Path(a.partition("=")[2]) / "run" for a in arguments if a.startswith("--log.folder="))


def check_losses(arguments: list[str], steps: int = 12) -> list[float]:
    """Every step was logged. On a real GPU the losses are finite and become smaller."""
    records = [r for r in read_metrics(folder_of(arguments) / "metrics.jsonl") if "loss" in r]
    losses = [r["loss"] for r in records]
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    if REAL:
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0]
    return losses


# ---- training


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(on_gpu, optimizer, compiled):
    more = NEW_MEMORY if optimizer == "soap" else {}
    output_of("train", *on_gpu, f"--optimizer={optimizer}", f"--compile={compiled}", **more)
    check_losses(on_gpu)


@needs_two_gpus
@pytest.mark.parametrize("optimizer, compiled", [*((name, "false") for name in OPTIMIZERS), ("mars_m", "true")])
def test_two_processes(on_gpu, optimizer, compiled):
    """Two processes train, and on real GPUs the losses are those of one process."""
    settings = [f"--optimizer={optimizer}", "--micro_batch=2", "--dropout=0", "--dtype=float32"]
    settings += [f"--compile={compiled}"]
    more = NEW_MEMORY if optimizer == "soap" else {}
    output_of("train", *on_gpu, *settings, gpus=2, **more)
    losses = check_losses(on_gpu)
    if REAL:
        output_of("train", *on_gpu, *settings, "--fresh", **more)
        assert losses == pytest.approx(check_losses(on_gpu), rel=1e-2)


def test_a_checkpoint_that_was_written_in_the_background_is_continued(on_gpu):
    settings = ["--optimizer=mars_m", "--checkpoint.background=true"]
    output_of("train", *on_gpu, *settings)
    shutil.rmtree(folder_of(on_gpu) / "checkpoints/step_0000012")
    assert "continuing at step 8" in output_of("train", *on_gpu, *settings)
    check_losses(on_gpu)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_signal_during_compilation_stops_the_run(on_gpu, tmp_path, steps):
    """The signal reaches the whole process group, and with it Inductor's workers, while they compile.

    They compile the first step, which need not be finished, or the evaluation after it, which must be.
    """
    caches = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), TRITON_CACHE_DIR=str(tmp_path / "triton"))
    arguments = [*on_gpu, "--optimizer=adamw", "--compile=true", "--steps=100000", "--eval_every=1"]
    process = begin("train", *arguments, TORCHINDUCTOR_COMPILE_THREADS="2", **caches)

    def wait_until(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not true():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def kernels() -> int:
        return len(list((tmp_path / "triton").glob("*")))

    try:
        if steps:
            metrics = folder_of(on_gpu) / "metrics.jsonl"
            wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) == steps)
        before = kernels()
        wait_until(lambda: kernels() > before)
        os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if steps:
        assert process.returncode == 0, errors
        assert "SIGTERM: will finish this step, save and stop" in errors
        assert "stopped at step 1 of 100000; the same command continues the run" in output
    else:
        assert process.returncode == 128 + signal.SIGTERM, errors
        assert "SIGTERM: received before the first step; nothing to save, exiting" in errors


# ---- the steady state


@pytest.mark.parametrize(
    "optimizer, compiled", [("mars_m", "false"), ("mars", "false"), ("adamw", "false"), ("mars_m", "true")]
)
def test_no_step_waits_for_the_device(on_gpu, optimizer, compiled):
    assert result_of("waits", *on_gpu, f"--optimizer={optimizer}", f"--compile={compiled}") == 0


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_fused_loss_trains_and_does_not_wait(on_gpu, compiled):
    """Compiled, it is a part of the one graph of the model."""
    settings = [*on_gpu, "--dtype=bfloat16", "--compute.fused_loss=true", f"--compile={compiled}"]
    assert result_of("waits", *settings) == 0
    output_of("train", *settings)
    check_losses(on_gpu)


def test_correctness_takes_no_warning_of_torch_for_a_wait(on_gpu):
    """torch warns once when it is asked to report waits; that is none."""
    assert result_of("waits_found", *on_gpu, "--optimizer=mars_m") == 0


@needs_two_gpus
@pytest.mark.parametrize(
    "shard, compiled", [("none", "false"), ("full", "false"), ("full", "true"), ("hybrid", "false")]
)
def test_no_step_of_two_processes_waits_for_the_device(on_gpu, shard, compiled):
    settings = ["--optimizer=mars_m", f"--shard={shard}", f"--compile={compiled}"]
    assert result_of("waits", *on_gpu, *settings, gpus=2) == 0


@needs_two_gpus
def test_two_sharded_processes_train_compiled(on_gpu):
    output_of("train", *on_gpu, "--optimizer=mars_m", "--shard=full", "--compile=true", "--ema=0.9", gpus=2)
    check_losses(on_gpu)


@needs_two_gpus
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_step_on_sharded_matrices_waits_for_nothing_and_bounds_its_memory(compiled):
    """Eight matrices (512, 2048) on two GPUs. 12 bytes an element cover the traffic in bfloat16 and Newton-Schulz."""
    found = result_of("sharded", "mars_m", compiled, gpus=2)
    assert (found["waits"], found["calls"]) == (0, 2 * 3)
    assert found["scratch"] <= 12 * (8 * 512 * 2048) / 2


def test_nothing_is_compiled_again_while_the_learning_rate_and_gamma_change(on_gpu):
    settings = ["--optimizer=mars_m", "--gamma_end=0.05", "--warmup=100", "--steps=200", "--compile=true"]
    assert result_of("compiled_later", *on_gpu, *settings) == 0


@pytest.mark.parametrize("setting", ["auto", "flash", "efficient", "math", "cudnn"])
def test_attention_uses_the_backend_that_the_setting_names(setting):
    expected = "flash" if setting == "auto" else setting
    assert result_of("attention", setting, TORCH_CUDNN_SDPA_DEPRIORITIZED="") == [expected, expected]


# ---- memory


@pytest.mark.parametrize("compiled, expandable", [("false", False), ("true", False), ("false", True)])
def test_the_memory_estimate_is_within_8_percent_of_the_allocators_peak(wide, compiled, expandable):
    arguments = wide("batch_size=16", "micro_batch=8", f"compile={compiled}")
    found = result_of("memory", *arguments, PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{expandable}")
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.08), found


@needs_two_gpus
def test_gradients_of_replicas_exist_once(wide):
    found = result_of("memory", *wide("batch_size=16", "micro_batch=4", "compile=false"), gpus=2)
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.04), found  # buckets beside them would be 8 %


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_memory_estimate_of_one_of_eight_sharded_processes(wide, compiled):
    settings = ["n_layer=12", "batch_size=128", "micro_batch=8", "optimizer=mars", "shard=full"]
    found = result_of("memory_of_one", "8", *wide(*settings, f"compile={compiled}"), memory=85 * GB)
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.08), found


def test_the_largest_micro_batch_that_fits(wide):
    found = {}
    for size in (12, 25, 80):
        arguments = wide("batch_size=480", "micro_batch=auto", "compile=false")
        found[size] = result_of("memory", *arguments, memory=size * GB)
        assert found[size]["peak"] <= found[size]["total"] == size * GB
    sizes = [f["micro_batch"] for f in found.values()]
    assert 1 < sizes[0] < sizes[1] < sizes[2] == 40, found  # 42 would have 2^31 logits


@pytest.mark.parametrize("micro_batch, expandable", [("auto", False), ("1", False), ("1", True)])
def test_too_little_memory_for_one_sequence_is_one_line(wide, micro_batch, expandable):
    arguments = wide("batch_size=4", f"micro_batch={micro_batch}", "compile=false")
    allocator = dict(PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{expandable}")
    done = start("train", *arguments, "--fresh", memory=1_200_000_000, **allocator)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_gpt: out of memory")
    assert "use a smaller" in last
    assert "Traceback" not in done.stderr


# ---- launches of kernels


@pytest.mark.parametrize(
    "size, compiled, most, scratch", [("124M", "false", 840, 1), ("124M", "true", 95, 1), ("1558M", "true", 340, 3)]
)
def test_launches_and_memory_of_a_mars_m_step(size, compiled, most, scratch):
    """836, 87 and 321 launches, and 0.9, 0.9 and 2.2 GB, by torch 2.13; only the null GPU counts launches."""
    found = result_of("launches", size, "mars_m", compiled, memory=85 * GB)
    assert 0 < sum(found["kernels"].values()) <= most, found
    assert found["scratch"] <= scratch * GB
