"""What the GPU benches share: model sizes, a session with a time limit, and the clock of the device."""

import argparse
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.report import ROOT, Report, results_folder
from config.load import load_config
from model import GPTConfig
from runtime.command import first_line

SIZES = {"124M": "gpt2_small", "355M": "gpt2_medium", "774M": "gpt2_large", "1558M": "gpt2_xl"}
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=500)
TIME_SCALE = float(os.environ.get("TIME_SCALE", 1))  # of all limits of time, for a rehearsal on a slow machine
LIMIT = 570 * TIME_SCALE  # seconds for a whole bench; later rows are reported as not measured


def shape_of(size: str) -> GPTConfig:
    """The model config of a GPT-2 size."""
    return load_config(ROOT / f"config/{SIZES[size]}.py").model


class TimeIsUp(BaseException):
    """The time limit is over. It is not an Exception, so that no library catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp inside the block after so many seconds."""

    def expire(number: int, frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Session:
    """One run of a GPU bench: its device, its report and its time limit.

    args: the parsed options of bench_parser. Raises SystemExit if there is no GPU and this is not a smoke test.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        if not args.smoke and not torch.cuda.is_available():
            sys.exit(f"bench.{name.partition('_')[0]}: needs a CUDA GPU; --smoke runs tiny shapes on the CPU")
        self.smoke, self.device = args.smoke, torch.device("cpu" if args.smoke else "cuda")
        self.report = Report(name, results_folder(args), self.device.type)
        self.ends = time.perf_counter() + LIMIT
        torch.manual_seed(0)

    def row(self, measure: Callable[[], dict], budget: float = 60, keep: bool = False, **names: object) -> dict:
        """Report `names` and the numbers that measure() returns; the result is the whole row.

        If measure() fails or takes longer than `budget` seconds, a note says so. Numbers that it has already given to
        `report.update` stay in the row. keep: do not drop compiled graphs, because the next row uses them.
        """
        self.report.begin(**names)
        note, left, budget = "", self.ends - time.perf_counter(), budget * TIME_SCALE
        try:
            if left <= 0:
                raise TimeIsUp
            with time_limit(min(budget, left)):
                self.report.update(**measure())
        except TimeIsUp:
            note = f"took longer than {budget:g} s" if budget < left else f"the {LIMIT:g} s of the bench are over"
        except torch.OutOfMemoryError:
            note = "out of memory"
        except Exception as error:
            note = first_line(error)
        row = self.report.rows[-1]
        if note not in ("", "out of memory"):
            note = f"{'stopped' if row.keys() > names.keys() else 'not measured'}: {note}"
        self.report.update(note=note)
        self.report.show()
        if not keep:
            torch._dynamo.reset()  # the cache of compiled graphs is too small for all shapes of a bench
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def seconds(self, function: Callable[[], object], rounds: int = 20, warmup: int = 5) -> float:
        """Median seconds of a call. On a GPU this is time on the device."""
        rounds, warmup = (2, 1) if self.smoke else (rounds, warmup)
        marks = []
        for _ in range(warmup + rounds):
            start = mark(self.device)
            function()
            marks.append((start, mark(self.device)))
        return statistics.median(elapsed(start, end) for start, end in marks[warmup:])

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)


def compiler(smoke: bool) -> AbstractContextManager:
    """Inside the block of a smoke test, torch.compile captures graphs and leaves them as they are."""
    quick = partial(torch.compile, backend="eager")
    return mock.patch.object(torch, "compile", quick) if smoke else nullcontext()


def mark(device: torch.device) -> Any:
    """A point in time: seconds, or on a GPU an event of the current stream, for which the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks; waits for the second one."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
