"""What the GPU benches share: sizes, a clock of the device, time budgets, tokens."""

import argparse
import gc
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.report import Report
from config.load import load_config
from data.shards import write_shard
from model import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"124M": "gpt2_small", "355M": "gpt2_medium", "774M": "gpt2_large", "1558M": "gpt2_xl"}
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=500)
LIMIT = 570  # seconds of a whole bench; what is not measured by then is said not to be


def shape_of(size: str) -> GPTConfig:
    """The shape of a GPT-2 by its size, from the config file of that size."""
    return load_config(ROOT / f"config/{SIZES[size]}.py").model


class TimeIsUp(BaseException):
    """A budget of seconds is spent. Not an Exception, so that no library on the way takes it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in here once the seconds are over."""

    def ring(number: int, frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Session:
    """One bench run: its device, its report, and its budget of time.

    smoke: tiny shapes on the CPU, results in a temporary folder unless one is given, and `backend` in
    the compiler's stead: "eager" captures graphs, "aot_eager" differentiates them, too.
    Raises SystemExit where a GPU is wanted and there is none.
    """

    def __init__(self, name: str, smoke: bool, folder: Path | None = None, backend: str = "eager") -> None:
        if not smoke and not torch.cuda.is_available():
            sys.exit(f"bench.{name.partition('_')[0]}: needs a CUDA GPU; --smoke runs tiny shapes on the CPU")
        self.smoke, self.backend, self.device = smoke, backend, torch.device("cpu" if smoke else "cuda")
        self.report = Report(name, self.device, folder or (Path(tempfile.mkdtemp()) if smoke else None))
        self.ends = time.perf_counter() + LIMIT
        torch.manual_seed(0)

    @property
    def left(self) -> float:
        return self.ends - time.perf_counter()

    def row(self, function: Callable[[], dict], budget: float = 60, keep: bool = False, **names: object) -> dict:
        """Report the names and what the function finds, and return that; failure or a spent budget becomes a note.

        keep: what was compiled, for the next row.
        """
        figures, note = {}, ""
        limit = min(budget, self.left)
        try:
            if limit <= 0:
                raise TimeIsUp
            with time_limit(limit), compiler(self.smoke, self.backend):
                figures = function()
        except TimeIsUp:
            note = f"not measured: over its {budget:g} s" if limit == budget else f"not measured: {LIMIT} s are over"
        except torch.OutOfMemoryError:
            note = "out of memory"
        except RuntimeError as error:
            note = f"not measured: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        if not keep:
            torch._dynamo.reset()  # one function is compiled for many shapes: more than its cache holds
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.report.add(**names, **figures, note=note)
        return figures

    def seconds(self, function: Callable[[], object], rounds: int = 20, warmup: int = 5) -> float:
        """Median seconds of a call, by the device's own clock on a GPU."""
        rounds, warmup = (2, 1) if self.smoke else (rounds, warmup)
        marks = []
        for _ in range(warmup + rounds):
            marks.append([mark(self.device)])
            function()
            marks[-1].append(mark(self.device))
        return statistics.median(elapsed(*pair) for pair in marks[warmup:])

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)


def compiler(smoke: bool, backend: str = "eager") -> AbstractContextManager:
    """In here torch.compile is itself, or in a smoke run hands its graphs to a backend that is quick to start."""
    return mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)) if smoke else nullcontext()


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A point in time, on a GPU that of its present stream; the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds between two marks; waits for the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def write_tokens(folder: str | Path, vocab_size: int, tokens: int) -> None:
    """A dataset of random tokens, the r-th most frequent 1/r as frequent as the first, as words are in a text."""
    draw = np.random.default_rng(0).random(tokens, dtype=np.float32)
    for name in ("train_000000.bin", "val_000000.bin"):
        write_shard(Path(folder, name), (vocab_size**draw - 1).astype(np.uint16), tokens)


def arguments(name: str, doc: str) -> argparse.ArgumentParser:
    """The options that these benches share."""
    parser = argparse.ArgumentParser(prog=f"bench.{name}", description=doc.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, seconds")
    parser.add_argument("--folder", type=Path, help="where results go; default bench/results, smoke: a temporary one")
    return parser
