"""Training steps for the benches: real runs of the trainer on random tokens, and one step without the trainer."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import ROOT
from bench.timing import SIZES, TINY
from config.load import load_config
from data.shards import write_shard
from model import GPT
from runtime.distributed import start_world
from train_gpt import Trainer
from training.clipping import GradientClipper
from training.compute import attention_kernel, collector_paused, torch_settings
from training.run_config import RunConfig

MICRO = {"124M": 40, "355M": 40, "774M": 24, "1558M": 16}  # sequences per forward pass; 42 have 2^31 logits
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
SMOKE = (*(f"{key}={getattr(TINY, key)}" for key in SHAPE_KEYS), "device=cpu", "batch_size=4", "micro_batch=2")
QUIET = ("val_windows=2", "eval_every=1000000", "checkpoint.every=1000000", "log.every=1000000")


def in_own_process(command: Sequence[str], tell: Callable[..., object], **variables: str) -> None:
    """Run a command. Each line of JSON that it prints goes to tell(**numbers) at once.

    variables: of the environment, beside this process's. Raises RuntimeError, or OutOfMemoryError, if it fails. An
    exception from outside, such as a time limit, ends the process.
    """
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, text=True)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stderr=errors, **pipes) as process,
    ):
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    tell(**json.loads(line))
            process.wait()
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        lines = errors.read().splitlines() or [f"exit status {process.returncode}"]
    if process.returncode:
        if too_little := [line for line in lines if "out of memory" in line]:
            raise torch.OutOfMemoryError(too_little[-1])
        raise RuntimeError(([line for line in lines if "error" in line.lower()] or lines)[-1])


def write_tokens(folder: Path, vocab_size: int, tokens: int) -> Path:
    """Write a dataset of random tokens; token r is about 1/r as frequent as the first, as words in a text are."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0).random(tokens, dtype=np.float32)
    for name in ("train_000000.bin", "val_000000.bin"):
        write_shard(folder / name, (vocab_size**draw - 1).astype(np.uint16), tokens)
    return folder


def run_arguments(folder: Path, size: str, smoke: bool, *settings: str) -> list[str]:
    """Arguments of train_gpt for a run with the name "run" in a folder.

    settings: "key=value"; later ones override earlier ones. smoke: a tiny model on the CPU, for any size and batch.
    """
    tokens = folder / "tokens"
    if not tokens.exists():
        write_tokens(tokens, TINY.vocab_size if smoke else 50257, 20_000 if smoke else 4_000_000)
    given = [f"data.path={tokens}", f"log.folder={folder / 'runs'}", "name=run", "warmup=0", *QUIET, *settings]
    given += SMOKE if smoke else []
    return [str(ROOT / f"config/{SIZES[size]}.py"), *(f"--{setting}" for setting in given)]


@contextmanager
def opened(run: RunConfig | list[str], trainer_class: Callable[..., Any] = Trainer) -> Iterator[Any]:
    """The trainer of a new run, from its config or from arguments. Inside the block, torch has the run's settings."""
    run = load_config(run[0], run[1:]) if isinstance(run, list) else run
    with torch_settings(run.compute), start_world(run.device) as world, collector_paused():
        trainer = trainer_class(run, world, fresh=True)
        trainer.begin()
        try:
            yield trainer
        finally:
            trainer.log.close()


def batch_of(t: Trainer, step: int) -> Tensor:
    """The tokens of a step, in pinned memory for a GPU, as the trainer's loop gets them."""
    batch = torch.from_numpy(t.loader.batch(step))
    return batch.pin_memory() if t.world.device.type == "cuda" else batch


def attention_of(t: Trainer) -> str:
    """The kernel that attention runs in: cudnn, flash, efficient or math."""
    c = t.run.model
    return attention_kernel(c.n_head, c.n_embd, c.block_size, c.dropout, t.run.dtype, t.world.device)


def take_step(t: Trainer, batch: Tensor) -> None:
    """One step of the trainer on a batch."""
    assert not t.lookahead
    t.set_rates()
    t.gradients(batch)
    t.update()


def optimizer_step(optimizer: Any, gradient: Callable[[Any], None], batch: Any, upcoming: Any) -> int:
    """One step; returns the number of gradients taken. The exact form of MARS first takes that of the upcoming batch.

    gradient: adds the gradients of a batch to the parameters.
    """
    exact = getattr(optimizer, "needs_lookahead", False)
    if exact:
        gradient(upcoming)
        optimizer.update_previous_grad()
        optimizer.zero_grad(set_to_none=True)
    gradient(batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if exact:
        optimizer.update_last_grad()
    return 2 if exact else 1


def step_function(model: nn.Module, optimizer: Any, idx: Tensor, targets: Tensor) -> Callable[[], int]:
    """A function that trains on one batch with gradient clipping."""
    clipper = GradientClipper(model, 1.0)

    def gradient(batch: tuple[Tensor, Tensor]) -> None:
        model(*batch).backward()
        clipper.clip(0)

    return partial(optimizer_step, optimizer, gradient, (idx, targets), (idx, targets))


def split_parameters(model: GPT) -> tuple[list[Tensor], list[Tensor]]:
    """The weight matrices of the layers, and all other parameters."""
    roles = model.parameter_roles()
    matrices: list[Tensor] = [p for name, p in model.named_parameters() if roles[name] == "matrix"]
    return matrices, [p for name, p in model.named_parameters() if roles[name] != "matrix"]
