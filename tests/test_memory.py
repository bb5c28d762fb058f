"""The micro-batch that fits: what is estimated, what is tried, that ranks agree, and that nothing else changes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

import train_gpt
from config.load import load_config
from model import GPT, GPTConfig
from runtime import memory
from runtime.distributed import World, start_world
from runtime.logger import read_metrics
from runtime.memory import (
    MARGIN,
    Footprint,
    candidates,
    choose_micro_batch,
    estimated_micro_batch,
    memory_need,
    peak_of_pass,
)

CPU, GPU = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda", 0))
SMALL = Footprint(
    **dict(params=124_000_000, state=10**9, layers=12, width=768, vocab=50304, block=1024),
    **dict(bf16=True, residual=4, recompute=False, processes=1),
)


def fits(most: int, tried: list | None = None):
    """An attempt that runs out of memory above `most` sequences."""

    def attempt(m):
        if tried is not None:
            tried.append(m)
        if m > most:
            raise torch.OutOfMemoryError(f"{m} sequences")
        return m * 10**9

    return attempt


def test_candidates_divide_and_a_cpu_takes_few():
    assert candidates(60, GPU) == [60, 30, 20, 15, 12, 10, 6, 5, 4, 3, 2, 1]
    assert candidates(60, CPU) == [6, 5, 4, 3, 2, 1]
    assert candidates(7, CPU) == [7, 1]


@pytest.mark.parametrize("gb", [2, 8, 24, 40, 80, 141, 1000])
def test_the_estimate_is_the_largest_divisor_that_fits_beside_the_margin(monkeypatch, gb):
    monkeypatch.setattr(memory, "available_memory", lambda device: (gb * 10**9, gb * 10**9))
    found = estimated_micro_batch(SMALL, 480, GPU)
    fitting = [m for m in range(1, 481) if 480 % m == 0 and memory_need(SMALL, m).total <= (1 - MARGIN) * gb * 1e9]
    assert found == max(fitting, default=1)
    assert {2: 1, 1000: 480}.get(gb, found) == found


def test_processes_on_a_cpu_share_its_memory(monkeypatch):
    room = memory_need(SMALL, 4).total
    monkeypatch.setattr(memory, "available_memory", lambda device: (room, room))
    assert estimated_micro_batch(SMALL, 480, CPU) == 4
    two = World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(World, "gather", lambda self, item: [item] * self.size)
    assert estimated_micro_batch(SMALL, 480, two) == 1


def test_out_of_memory_steps_down_to_the_next_divisor(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda device: (50 * 10**9, 80 * 10**9))
    tried: list[int] = []
    choice = choose_micro_batch(SMALL, 480, GPU, fits(30, tried))
    assert estimated_micro_batch(SMALL, 480, GPU) == 48
    assert tried == [60, 48, 40, 32, 30]  # one above the estimate first
    assert str(choice) == "micro-batch 30 x accumulation 16: about 30 of 80 GB; 60, 48, 40, 32 did not fit"
    assert capsys.readouterr().err.splitlines() == [f"trying a micro-batch of {m}" for m in tried]
    with pytest.raises(ValueError, match="out of memory with one sequence at a time: .* use a smaller model"):
        choose_micro_batch(SMALL, 480, GPU, fits(0))


def test_on_a_cpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: (10**12, 10**12))
    choice = choose_micro_batch(SMALL, 480, CPU, fits(0))
    assert (choice.size, choice.accumulation) == (8, 60)
    assert choice.needed == memory_need(SMALL, 8).total


def test_a_pass_leaves_weights_gradients_and_generator_as_they_were():
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
    assert all(grads)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "mars_m"])
def test_a_run_whose_choice_was_tried_equals_one_that_was_told(arguments, optimizer, monkeypatch, capsys):
    """The trainer's own pass, run out of memory at 12 and 6 sequences; 4 is what it then trains with."""

    def tried(footprint, share, world, attempt):
        monkeypatch.setattr(memory, "available_memory", lambda device: (10**9, 10**9))
        assert memory.memory_need(footprint, 4).total < 10**9
        monkeypatch.setattr(World, "is_main", True)

        def small(m):
            attempt(m)
            return fits(4)(m)

        chosen = choose_micro_batch(footprint, share, World(0, 1, torch.device("cuda", 0)), small)
        assert small(4)
        return chosen

    arguments = [*arguments, f"--optimizer={optimizer}"]
    train_gpt.main([*arguments, "--micro_batch=4"])
    told = train_metrics(arguments)
    monkeypatch.setattr(train_gpt, "choose_micro_batch", tried)
    train_gpt.main([*arguments, "--micro_batch=auto", "--fresh"])
    assert train_metrics(arguments) == told
    assert "chosen     micro-batch 4 x accumulation 3: about 4 of 1 GB; 12, 6 did not fit" in capsys.readouterr().out


def folder_of(arguments):
    run = load_config(arguments[0], arguments[1:])
    return train_gpt.Path(run.log.folder) / run.name


def train_metrics(arguments):
    records = read_metrics(folder_of(arguments) / "metrics.jsonl")
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss")) for r in records]


def test_what_was_chosen_is_said_and_recorded_and_may_change(arguments, capsys):
    train_gpt.main([*arguments, "--micro_batch=auto", "--steps=4"])
    output = capsys.readouterr().out
    assert "batch      12 sequences = 1 processes x 6 x 2 accumulated" in output
    assert "chosen     micro-batch 6 x accumulation 2: about" in output
    facts = json.loads((folder_of(arguments) / "environment.json").read_text())
    assert (facts["micro_batch"], facts["accumulation"], facts["processes"]) == (6, 2, 1)
    assert json.loads((folder_of(arguments) / "config.json").read_text())["micro_batch"] is None
    train_gpt.main([*arguments, "--micro_batch=2", "--steps=4"])  # continues; nothing to do
    assert "\n  chosen" not in capsys.readouterr().out
    train_gpt.main([*arguments, "--micro_batch=auto", "--preflight"])
    assert "batch    12 sequences = 1 processes x 6 x 2, estimated to fit" in capsys.readouterr().out


def main() -> None:
    """What each of two processes runs: one of them has less room, the other runs out of memory."""
    with start_world("cpu") as world:
        gpu = World(world.rank, world.size, torch.device("cuda", 0), world.control)
        memory.available_memory = lambda device: ((80 - 40 * world.rank) * 10**9, 80 * 10**9)
        choice = choose_micro_batch(SMALL, 480, gpu, fits(480 if world.rank else 20))
        assert choice.failed == (48, 40, 32, 30, 24), choice  # from the estimate of rank 1, which has half the room
        assert choice.size == 20, choice

        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=60))
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        tokens = torch.zeros(3, 8, dtype=torch.long)

        def loss():
            with forward.no_sync():
                return forward(tokens, tokens)

        if world.rank == 0:  # a pass exchanges nothing, so a rank that fails alone leaves nobody waiting
            peak_of_pass(loss, model.parameters(), 0, torch.device("cpu"))
        assert world.gather("here") == ["here", "here"]
        forward(tokens, tokens).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_ranks_agree_on_what_fits_all_of_them():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
