"""The micro-batch that fits: the estimate, the attempts, agreement of ranks, and no other effect on a run."""

import json

import pytest
import torch
from conftest import ROOT, finish
from forked import Forked

import train_gpt
from config.load import load_config
from model import GPT, GPTConfig
from optimizers import AdamWConfig, build_optimizer
from runtime.command import is_out_of_memory
from runtime.distributed import ALONE, World, start_world
from training import memory, preflight
from training.logger import read_metrics
from training.memory import (
    MARGIN,
    MemoryEstimate,
    choose_micro_batch,
    estimated_micro_batch,
    first_attempt,
    largest_fitting,
    measured_micro_batch,
    peak_of_pass,
)
from training.preflight import memory_estimate

GPU = World(0, 1, torch.device("cuda", 0))
GB = 10**9
NEED = MemoryEstimate(weights=GB // 2, gradients=GB // 2, optimizer=GB, activations=GB // 2)  # 2 GB and 0.5 a sequence


def fits(most: int, tried: list | None = None, error: BaseException | type[BaseException] = torch.OutOfMemoryError):
    """An attempt that runs out of memory above `most` sequences."""

    def attempt(m):
        if tried is not None:
            tried.append(m)
        if m > most:
            raise error
        return m * GB

    return attempt


@pytest.mark.parametrize("gb", [2, 8, 24, 40, 80, 141, 1000])
def test_the_estimate_is_the_largest_divisor_that_fits_without_the_margin(gb):
    found = estimated_micro_batch(NEED, 480, GPU, (gb * GB, gb * GB))
    fitting = [m for m in range(1, 481) if 480 % m == 0 and 2 + m / 2 <= (1 - MARGIN) * gb]
    assert found == max(fitting, default=1)
    assert {2: 1, 1000: 480}.get(gb, found) == found


def test_the_processes_of_a_cpu_divide_its_memory(monkeypatch):
    room = NEED.total(4)
    assert estimated_micro_batch(NEED, 480, ALONE, (room, room)) == 4
    monkeypatch.setattr(World, "gather", lambda self, item: [item] * self.size)
    assert estimated_micro_batch(NEED, 480, World(0, 2, torch.device("cpu"), local_size=2), (room, room)) == 1


def test_a_size_that_runs_out_of_memory_is_followed_by_the_next_divisor(capsys):
    tried: list[int] = []
    choice = measured_micro_batch(480, 48, ALONE, 80 * GB, fits(30, tried))
    assert tried == [48, 40, 32, 30]
    assert str(choice) == "micro-batch 30: about 30 of 80 GB; 48, 40, 32 did not fit"
    assert capsys.readouterr().err.splitlines() == [f"trying a micro-batch of {m}" for m in tried]


@pytest.mark.parametrize("room, first", [(26, 48), (30, 48), (30.5, 60), (31.9, 60), (32, 60), (1000, 480)])
def test_the_next_size_is_tried_first_if_the_estimate_is_just_too_high_for_it(room, first):
    """48 sequences need 26 GB and 60 need 32 GB. An attempt that is sure to fail would compile for nothing."""
    memory = (round((room + MARGIN * 80) * GB), 80 * GB)
    assert first_attempt(NEED, estimated_micro_batch(NEED, 480, GPU, memory), 480, GPU, memory) == first


def test_an_attempt_may_run_out_of_memory_in_a_library():
    too_little, invalid = (
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: invalid argument"),
    )
    assert measured_micro_batch(12, 6, ALONE, 80 * GB, fits(4, error=too_little)).failed == (6,)
    with pytest.raises(RuntimeError, match="invalid argument"):
        measured_micro_batch(12, 6, ALONE, 80 * GB, fits(4, error=invalid))


def test_the_largest_size_is_tried_first_if_the_estimate_says_that_it_fits():
    tried: list[int] = []
    assert measured_micro_batch(12, 12, ALONE, GB, fits(12, tried)).failed == ()
    assert tried == [12]


def test_too_little_memory_for_one_sequence_is_an_error():
    with pytest.raises(ValueError, match="out of memory with one sequence at a time .* use a smaller model"):
        measured_micro_batch(480, 48, ALONE, 80 * GB, fits(0))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
        "NCCL error: Failed to CUDA calloc 6291456 bytes",
        "Storage size calculation overflowed with sizes=[4611686018427387904, 8]",
    ],
)
def test_too_little_memory_is_recognized_in_the_messages_of_every_library(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: invalid argument"))


def test_libraries_take_their_memory_before_the_attempts_and_the_cache_is_emptied_after(monkeypatch):
    """NCCL allocates at the first all-reduce. What an attempt leaves in the cache is missing for libraries."""
    calls = []
    monkeypatch.setattr(memory, "available_memory", lambda device: (10**9, 10**9))
    monkeypatch.setattr(World, "sum", lambda self, x: calls.append("all-reduce") or x)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    world = World(0, 1, torch.device("meta"))  # no CPU, so it is treated as a GPU
    choose_micro_batch(MemoryEstimate(0, 0, 0, 1), 1, world, lambda size: calls.append("attempt") or 1)
    assert calls == ["all-reduce", "attempt", "empty"]


def test_a_cpu_makes_no_attempt():
    choice = choose_micro_batch(MemoryEstimate(10, 10, 20, 1), 480, ALONE, fits(0))
    assert (choice.size, choice.needed) == (8, 48)


def test_a_pass_does_not_change_weights_gradients_and_generator():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=60, dropout=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.zeros(3, 8, dtype=torch.long)
    grads = []

    def loss():
        grads.extend(p.grad is not None for p in model.parameters())  # as while accumulating
        return model(tokens, tokens)

    def out_of_memory():
        loss().backward()
        raise torch.OutOfMemoryError

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert peak_of_pass(loss, model.parameters(), 1000, torch.device("cpu")) == 0
    with pytest.raises(torch.OutOfMemoryError):
        peak_of_pass(out_of_memory, model.parameters(), 0, torch.device("cpu"))
    count = len(before)  # the first pass allocates the gradients and the second adds to them, as in a step
    assert grads[: 2 * count] == [False] * count + [True] * count
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "mars_m"])
def test_a_measured_micro_batch_trains_like_a_given_one(arguments, optimizer, monkeypatch, capsys):
    """The trainer's own forward and backward pass runs out of memory with 12 and 6 sequences, so the run uses 4."""

    def measured(need, per_process, world, attempt):
        def small(m):
            attempt(m)
            return fits(4)(m)

        return measured_micro_batch(per_process, 12, world, GB, small)

    arguments = [*arguments, f"--optimizer={optimizer}"]
    train_gpt.main([*arguments, "--micro_batch=4"])
    expected = train_metrics(arguments)
    monkeypatch.setattr(preflight, "choose_micro_batch", measured)
    train_gpt.main([*arguments, "--micro_batch=auto", "--fresh"])
    assert train_metrics(arguments) == expected
    assert "chosen     micro-batch 4: about 4 of 1 GB; 12, 6 did not fit" in capsys.readouterr().out


def folder_of(arguments):
    run = load_config(arguments[0], arguments[1:])
    return train_gpt.Path(run.log.folder) / run.name


def train_metrics(arguments):
    records = read_metrics(folder_of(arguments) / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss")) for r in records]


def test_the_chosen_micro_batch_is_printed_and_recorded_and_may_change(arguments, capsys):
    train_gpt.main([*arguments, "--micro_batch=auto", "--steps=4"])
    output = capsys.readouterr().out
    assert "batch      12 sequences = 1 processes x 6 x 2 accumulated" in output
    assert "chosen     micro-batch 6: about" in output
    facts = json.loads((folder_of(arguments) / "environment.json").read_text())
    assert (facts["micro_batch"], facts["accumulation"], facts["processes"]) == (6, 2, 1)
    assert json.loads((folder_of(arguments) / "config.json").read_text())["micro_batch"] is None
    train_gpt.main([*arguments, "--micro_batch=2", "--steps=4"])  # continues; nothing to do
    assert "\n  chosen" not in capsys.readouterr().out
    train_gpt.main([*arguments, "--micro_batch=auto", "--preflight"])
    assert "batch    12 sequences = 1 processes x 6 x 2, estimated to fit" in capsys.readouterr().out


def main() -> None:
    """The program of each of two processes. Rank 1 has less memory by the estimate; rank 0 runs out of memory."""
    with start_world("cpu") as world:
        gpu = World(world.rank, world.size, torch.device("cuda", 0), world.control)
        memory = ((60 - 29 * world.rank) * GB, 80 * GB)
        first = first_attempt(NEED, estimated_micro_batch(NEED, 480, gpu, memory), 480, gpu, memory)
        choice = measured_micro_batch(480, first, world, 80 * GB, fits(480 if world.rank else 20))
        assert choice.failed == (40, 32, 30, 24), choice  # from the estimate of rank 1, which is 40
        assert choice.size == 20, choice

        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=60))
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        tokens = torch.zeros(3, 8, dtype=torch.long)

        def loss():
            with forward.no_sync():
                return forward(tokens, tokens)

        if world.rank == 0:  # a pass does not communicate, so no rank waits for one that fails alone
            peak_of_pass(loss, model.parameters(), 0, torch.device("cpu"))
        assert world.gather("here") == ["here", "here"]
        forward(tokens, tokens).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_ranks_agree_on_what_fits_all_of_them():
    finish(Forked(main, processes=2))


def test_a_chosen_micro_batch_has_at_most_2_to_the_31_logits(dataset):
    """41 sequences of GPT-2, and 40 if the batch of 480 must divide, for any amount of memory."""
    run = load_config(ROOT / "config" / "gpt2_small.py", [f"--data.path={dataset}", "--vocab_size=50257"])
    with torch.device("meta"):
        model = GPT(run.model)
    need = memory_estimate(run, model, build_optimizer(model, AdamWConfig()), ALONE)
    assert need.most == 41
    gpu = World(0, 1, torch.device("cuda"))
    assert largest_fitting(need, 480, gpu, (10**15, 10**15)) == 40
    assert first_attempt(need, 40, 480, gpu, (10**15, 10**15)) == 40
