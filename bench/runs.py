"""Real training runs for the benches: the trainer itself, its settings by name, on synthetic tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import ROOT, SIZES, write_tokens
from config.load import load_config
from runtime.compute import torch_settings
from runtime.distributed import start_world
from train_gpt import Trainer

MICRO = {"124M": 60, "355M": 40, "774M": 24, "1558M": 16}  # sequences that a forward pass of a bench takes
TINY = ("n_layer=1", "n_head=2", "n_embd=32", "block_size=64", "vocab_size=500", "device=cpu")
SMALL_BATCH = ("batch_size=4", "micro_batch=2")
QUIET = ("val_windows=2", "eval_every=1000000", "checkpoint.every=1000000", "log.every=1000000")


def run_arguments(folder: Path, size: str, smoke: bool, *settings: str) -> list[str]:
    """What train_gpt.main is to be called with for a run "run" in a folder; of settings ("key=value") the last counts.

    smoke: a tiny model on the CPU, whatever the size and the batch.
    """
    tokens = folder / "tokens"
    if not tokens.exists():
        tokens.mkdir(parents=True)
        write_tokens(tokens, 500 if smoke else 50257, 20_000 if smoke else 4_000_000)
    given = [f"data.path={tokens}", f"log.folder={folder / 'runs'}", "name=run", "warmup=0", *QUIET, *settings]
    given += [*TINY, *SMALL_BATCH] if smoke else []
    return [str(ROOT / f"config/{SIZES[size]}.py"), *(f"--{setting}" for setting in given)]


@contextmanager
def opened(arguments: list[str]) -> Iterator[Trainer]:
    """The trainer of a run that starts over, under that run's settings of torch."""
    run = load_config(arguments[0], arguments[1:])
    with torch_settings(run.compute), start_world(run.device) as world:
        trainer = Trainer(run, world, fresh=True)
        try:
            yield trainer
        finally:
            trainer.log.close()


def take_step(t: Trainer, batch: Tensor) -> None:
    """One training step on a batch, as the loop takes it."""
    assert not t.lookahead
    t.set_rates()
    t.gradients(batch)
    t.update()


def batch_of(t: Trainer, step: int) -> Tensor:
    """A step's tokens as the loop's prefetching hands them over."""
    batch = torch.from_numpy(t.loader.batch(step))
    return batch.pin_memory() if t.world.device.type == "cuda" else batch
