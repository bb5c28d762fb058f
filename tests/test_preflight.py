"""The preflight: a check of what a run needs, before it starts."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, ROOT, finish, launch, make_dataset

import train_gpt
from config.load import load_config
from model import GPT, GPTConfig
from optimizers import AdamWConfig, build_optimizer
from optimizers.state import state_bytes
from runtime.distributed import ALONE, World
from runtime.errors import UserError
from runtime.hardware import MEMORY_GB, Machines, parse_machines, peak_of_card
from runtime.probe import existing_parent, probe
from training.compute import ComputeConfig, apply_compute
from training.memory import MemoryEstimate
from training.preflight import (
    all_reduce_seconds,
    checkpoints_kept,
    compared,
    measured_rate,
    memory_estimate,
    memory_lines,
    on_meta_device,
    time_needed,
)


def estimate(run, world=ALONE):
    return memory_estimate(run, *on_meta_device(run, world), world)


def kept_for_backward(shape: GPTConfig, half: bool, compute: ComputeConfig) -> int:
    """Bytes that autograd keeps for backward, without parameters; each storage counts once."""
    model, seen, kept = GPT(shape), {}, []
    apply_compute(model, compute, half)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no later tensor gets the same address
        return tensor

    tokens = torch.zeros(2, shape.block_size, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(tokens, tokens)
    return sum(seen.values())


@pytest.mark.parametrize("half, residual", [(False, "float32"), (True, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_grow_with_depth_as_autograd_keeps_them(arguments, half, residual, recompute):
    compute = ComputeConfig(residual=residual, activation_checkpointing=recompute)
    shapes = [GPTConfig(n_layer=n, n_head=2, n_embd=128, block_size=128, vocab_size=64) for n in (1, 4)]
    one, four = (kept_for_backward(shape, half, compute) for shape in shapes)
    if half and not recompute:  # autocast's bf16 copies of the weights are kept, too; counted among the weights
        one, four = one - 2 * 12 * 128**2, four - 4 * 2 * 12 * 128**2
    run = load_config(arguments[0], [*arguments[1:], f"--dtype={'bfloat16' if half else 'float32'}"])
    needs = []
    for shape in shapes:
        model = GPT(shape)
        apply_compute(model, compute, half)
        needs.append(2 * memory_estimate(run, model, build_optimizer(model, AdamWConfig()), ALONE).activations)
    assert needs[1] - needs[0] == pytest.approx(four - one, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "mars", "mars_m", "muon"])
def test_weights_gradients_and_state_are_those_of_the_trainer(arguments, optimizer):
    run = load_config(arguments[0], [*arguments[1:], f"--optimizer={optimizer}"])
    need = estimate(run)
    trainer = train_gpt.Trainer(run, ALONE, False)
    assert need.optimizer == state_bytes(trainer.optimizer)
    assert need.weights == need.gradients == sum(4 * p.numel() for p in trainer.model.parameters())
    assert need.total(2) == need.weights + need.gradients + need.optimizer + 2 * need.activations


def test_the_exact_form_keeps_one_more_gradient_and_replicas_need_no_more(arguments):
    runs = [
        load_config(arguments[0], [*arguments[1:], "--optimizer=mars", f"--is_approx={approx}"])
        for approx in ("true", "false")
    ]
    approx, exact = map(estimate, runs)
    corrected = sum(p.numel() for p in GPT(runs[0].model).parameters() if p.dim() >= 2)
    assert exact.total(1) - approx.total(1) == exact.optimizer - approx.optimizer == 4 * corrected
    model, optimizer = on_meta_device(runs[0], ALONE)
    two = memory_estimate(runs[0], model, optimizer, World(0, 2, torch.device("cpu")))
    assert two.gradients == approx.gradients


@pytest.mark.parametrize("optimizer, all_of_it", [("adamw", 8), ("mars", 12)])
def test_shards_need_a_part_of_the_weights_and_of_the_state(arguments, optimizer, all_of_it):
    """One block is gathered while the next one computes; gradients are whole until a step's last micro-batch."""
    words = [*arguments[1:], f"--optimizer={optimizer}", "--shard=full"]
    run = load_config(arguments[0], words)
    model = GPT(run.model)
    params, block = model.num_params(), sum(p.numel() for p in model.transformer.h[0].parameters())
    others = params - run.model.n_layer * block
    need = estimate(run, World(0, 4, torch.device("cpu")))
    assert need.weights == params + 4 * (others + 2 * block)
    assert need.gradients == params + 4 * params + 4 * max(block, others)
    assert need.optimizer <= all_of_it * params / 4 + 1


@pytest.mark.parametrize(
    "shard, expected", [("none", "exceeds the 24.00 GB available"), ("full", "; 24.00 GB are available")]
)
def test_the_largest_model_fits_on_small_cards_if_it_is_sharded(capsys, shard, expected):
    words = ["--optimizer=adamw", "--micro_batch=auto", f"--shard={shard}"]
    with suppress(SystemExit):
        train_gpt.main(["config/gpt2_xl.py", "--preflight", "--as=8xRTX4090", *words])
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "steps, every, keep, milestone_every, expected",
    [(100, 10, 2, 0, 4), (100, 10, 2, 50, 6), (10, 10, 2, 0, 2), (100, 30, 1, 60, 4)],
)
def test_the_largest_number_of_checkpoints_on_the_disk(steps, every, keep, milestone_every, expected):
    assert checkpoints_kept(steps, every, keep, milestone_every) == expected


def test_sizes_rates_and_times(tmp_path):
    assert time_needed(180_122, 2.0) == "1 day, 1:01:01 at 2 tokens/s"
    assert time_needed(1, 2.0) == "0:00:01 at 2 tokens/s"
    assert time_needed(5, None) == "unknown"
    assert existing_parent(tmp_path / "not" / "yet") == tmp_path
    assert measured_rate([{"tokens_per_s": 3.0}, {"val_loss": 1.0}, {"tokens_per_s": 5.0}]) == 4.0
    assert measured_rate([]) is None
    assert compared(2e9, 1e9) == ", exceeds the 1.00 GB available"
    assert compared(2e9, math.inf) == ""
    assert all_reduce_seconds(ALONE) is None


def test_the_preflight_creates_no_folder(arguments, capsys, tmp_path):
    train_gpt.main([*arguments, "--preflight", "--verify", "--tokens_per_s=19.2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "preflight of run on 1 x cpu"
    assert [line.split()[0] for line in lines[1:]] == [
        *("memory", "batch", "disk", "tokens", "shards", "time", "network", "files", "files"),
    ]
    assert "for 4 checkpoints; " in lines[3]
    assert "2,304 in 12 steps: 0.12 epochs of 20,000" in lines[4]
    assert lines[5] == "  shards   headers, counts and sha256 agree"
    assert lines[6] == "  time     0:02:00 at 19 tokens/s"
    assert lines[8] == "  files    write, flush, lock and rename work"
    assert not (tmp_path / "runs").exists()


def test_the_copy_of_background_checkpoints_is_reported(arguments, capsys):
    train_gpt.main([*arguments, "--preflight", "--checkpoint.background=true"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  host"))
    params = GPT(load_config(arguments[0], arguments[1:]).model).num_params()
    assert line == f"  host     {12 * params / 1e9:.2f} GB for what checkpoints are written from"


def test_the_speed_is_read_from_the_metrics_of_the_run(arguments, capsys, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_s": 2304.0}) + "\n")
    train_gpt.main([*arguments, "--preflight"])
    assert "time     0:00:01 at 2,304 tokens/s" in capsys.readouterr().out


def test_a_damaged_shard_fails_the_preflight(tmp_path, capsys):
    folder = make_dataset(tmp_path / "d")
    with open(folder / "train_000000.bin", "r+b") as f:
        f.seek(2000)
        f.write(b"\1\0")
    common = [str(CONFIG), f"--data.path={folder}", f"--log.folder={tmp_path / 'runs'}", "--preflight"]
    train_gpt.main(common)
    with pytest.raises(SystemExit) as caught:
        train_gpt.main([*common, "--verify"])
    assert caught.value.code == 1
    assert "train_000000.bin: its sha256 is not the manifest's" in capsys.readouterr().out


def test_all_processes_of_a_cpu_share_its_memory(arguments, capsys, monkeypatch):
    """Two processes of 20.5 GB do not fit into 23 GB."""
    run = load_config(arguments[0], arguments[1:])
    monkeypatch.setattr("training.preflight.available_memory", lambda device: (23 * 10**9, 25 * 10**9))
    huge = MemoryEstimate(weights=20 * 10**9, gradients=0, optimizer=0, activations=10**7)
    monkeypatch.setattr("training.preflight.memory_estimate", lambda *_: huge)
    for processes, enough in ((1, True), (2, False)):
        world = World(0, processes, torch.device("cpu"), local_size=processes)
        with monkeypatch.context() as patched:
            patched.setattr(World, "gather", lambda self, item: [item])
            patched.setattr(World, "group", None)
            lines, fits = memory_lines(run, world, None)
        assert fits is enough
        assert ("exceeds the 11.50 GB available" in lines[0]) is not enough


def test_more_than_ten_epochs_are_a_warning(arguments, capsys):
    train_gpt.main([*arguments, "--preflight", "--steps=2000"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  tokens"))
    assert line.endswith("; more than 10: the model will memorize the text")
    assert "19.23 epochs" in line


def test_without_a_dataset_memory_disk_and_time_are_reported_all_the_same(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        train_gpt.main([*arguments, "--preflight", "--data.path=nowhere", "--tokens_per_s=100"])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "shards   dataset folder nowhere: not found; prepare one, for example: python -m data.prepare" in printed
    assert "time     0:00:24 at 100 tokens/s" in printed
    assert "memory   at least" in printed


def test_a_run_is_planned_for_machines_that_are_not_here(capsys):
    """8 x A100: 6 N + 12 L C T FLOPs a token at 40 % of 312 TFLOP/s, and a sixteenth of the state of the matrices."""
    config = ROOT / "config" / "gpt2_small.py"
    printed = []
    for cards in ("8xA100-80GB", "2x8xA100-80GB"):
        train_gpt.main([str(config), "--optimizer=mars_m", "--preflight", f"--as={cards}", "--data.path=nowhere"])
        printed.append(capsys.readouterr().out)
    model = GPT(load_config(config).model)
    rate = 0.4 * 8 * 312e12 / model.flops_per_token()
    assert printed[0].startswith("preflight of gpt2_small-mars_m-nowhere-49.2B on 8 x A100-80GB\n")
    assert f"at {rate:,.0f} tokens/s, with an assumed MFU of 40%, not measured" in printed[0]
    assert "80.00 GB are available" in printed[0]
    matrices = sum(p.numel() for n, p in model.named_parameters() if model.parameter_roles()[n] == "matrix")
    rest = model.num_params() - matrices
    assert f"optimizer {(8 * matrices / 16 + 8 * rest) / 1e9:.2f} GB" in printed[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("8H100", "unknown card; nearest: 8xH100"),
        ("8xH1000", "unknown card; nearest: 8xH100"),
        ("2x4x8xH100", "must be MACHINESxGPUSxCARD, for example 2x8xH100"),
        ("0xH100", "must be MACHINESxGPUSxCARD"),
        ("", "unknown card"),
    ],
)
def test_machines_that_nobody_has_are_named(text, message):
    with pytest.raises(UserError, match=f"--as={text}: .*{message}"):
        parse_machines(text)


def test_machines_are_read_in_the_forms_that_people_write():
    assert parse_machines("H100") == Machines(1, 1, "H100")
    assert parse_machines("8xrtx4090") == Machines(1, 8, "RTX 4090")
    assert parse_machines("2 x 8 x a100-80gb") == Machines(2, 8, "A100-80GB")
    assert all(peak_of_card(card) for card in MEMORY_GB)


@pytest.mark.parametrize(
    "call, code, line, enough",
    [
        ("os.fsync", errno.EINVAL, "cannot flush a folder (Invalid argument): after a power failure", True),
        ("os.fsync", errno.EIO, "cannot flush a folder (Input/output error): no checkpoint can be kept", False),
        ("os.fsync of files", errno.EIO, "cannot flush a file (Input/output error): no checkpoint", False),
        ("fcntl.flock", errno.ENOSYS, "cannot lock a file (Function not implemented): never start", True),
        ("os.replace", errno.EPERM, "cannot rename a file (Operation not permitted): no record", False),
        ("os.rename", errno.EXDEV, "cannot rename a folder (Invalid cross-device link): no checkpoint", False),
        ("os.mkdir", errno.EROFS, "cannot write (Read-only file system): no run can start here", False),
    ],
)
def test_what_the_file_system_cannot_do_is_said_with_what_follows(tmp_path, monkeypatch, call, code, line, enough):
    sync = os.fsync

    def refuse(*arguments):
        is_folder = call.startswith("os.fsync") and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
        if call.startswith("os.fsync") and is_folder == call.endswith("files"):
            return sync(*arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call.split()[0], refuse)
    lines, good = probe(tmp_path)
    monkeypatch.undo()
    assert [found for found in lines if line in found] == lines
    assert (len(lines), good) == (1, enough)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_fails_the_preflight(arguments, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(SystemExit):
        train_gpt.main([*arguments, "--preflight"])
    assert "exceeds the 0.00 GB available" in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["fast", "0", "-1", "inf", "1e-320"])
def test_a_speed_must_be_a_number_of_at_least_1(arguments, rate):
    with pytest.raises(SystemExit, match=f"--tokens_per_s={rate}: "):
        train_gpt.main([*arguments, "--preflight", f"--tokens_per_s={rate}"])


@pytest.mark.parametrize("word", ["--verify", "--tokens_per_s=5", "--as=8xH100"])
def test_options_of_the_preflight_are_refused_without_it(arguments, word):
    with pytest.raises(SystemExit, match="--tokens_per_s=N, --verify and --as=GPUS: need --preflight"):
        train_gpt.main([*arguments, word])


def test_errors_that_stop_a_run_stop_the_preflight(arguments):
    with pytest.raises(SystemExit, match="data.hellaswag=nowhere: cannot be read"):
        train_gpt.main([*arguments, "--preflight", "--data.hellaswag=nowhere"])
    with pytest.raises(SystemExit, match="out of memory; use a smaller"):
        train_gpt.main([*arguments, "--preflight", "--n_embd=1e10"])


def test_two_ranks_communicate_and_print_one_report(arguments):
    printed = finish(launch([*arguments, "--preflight", "--verify", "--optimizer=mars_m"], processes=2))
    assert "preflight of run on 2 x cpu" in printed
    assert "headers, counts and sha256 agree" in printed
    assert "network  all-reduce of 17 MB in" in printed
    assert printed.count("preflight of") == 1


def test_an_all_reduce_that_fails_is_an_error_with_advice(monkeypatch):
    def broken(self, x):
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(World, "sum", broken)
    with pytest.raises(
        ValueError, match=r"over 2 processes failed \(NCCL error: unhandled system error\); set NCCL_SOCKET"
    ):
        all_reduce_seconds(World(0, 2, torch.device("cpu")))
    monkeypatch.setattr(World, "sum", lambda self, x: x)
    with pytest.raises(ValueError, match="gives wrong sums"):  # nothing was added
        all_reduce_seconds(World(0, 2, torch.device("cpu")))


def test_the_four_sizes_are_estimated(dataset):
    """The model is on the meta device, so its size does not matter."""
    for size, millions in (("small", 124), ("medium", 354), ("large", 773), ("xl", 1557)):
        path = Path(__file__).parent.parent / "config" / f"gpt2_{size}.py"
        run = load_config(path, [f"--data.path={dataset}", "--vocab_size=50257", "--block_size=16", "--device=cpu"])
        assert estimate(run).weights / 4e6 == pytest.approx(millions, rel=0.02)
