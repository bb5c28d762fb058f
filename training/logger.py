"""The records of a run: metrics.jsonl, optionally Weights & Biases, and lines on the console.

metrics.jsonl is the reference. The trainer and the reports read no other record.
"""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from optimizers.options import errors_of, option
from runtime.distributed import World
from runtime.errors import UserError
from runtime.files import write_durably

METRICS, UNREADABLE, WANDB_ID = "metrics.jsonl", "metrics.unreadable", "wandb_id"


@dataclass(frozen=True)
class LogConfig:
    """Where the run folder is created, and where metrics go."""

    folder: str = option("runs", "folder in which run folders are created", on_resume="free")
    every: int = option(10, "steps between log lines", least=1, on_resume="free")
    wandb: Literal["online", "offline", "off", "disabled"] = option(
        "off", "copy metrics to Weights & Biases; the environment variable WANDB_MODE comes first", on_resume="free"
    )
    tensorboard: bool = option(False, "write TensorBoard event files into the run folder", on_resume="free")
    project: str = option("gpt2", "wandb project; the environment variable WANDB_PROJECT comes first", on_resume="free")

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        return errors_of(self)


class Meter:
    """Measures the seconds of training, without evaluations and checkpoints, and the seconds of waiting for data.

    trained: seconds of training before this start. tokens, flops: per step. peak_flops: FLOP/s of all devices; 0 if
    unknown.
    """

    def __init__(self, trained: float = 0.0, tokens: int = 0, flops: float = 0.0, peak_flops: float = 0.0) -> None:
        self.trained, self.tokens, self.flops, self.peak_flops = trained, tokens, flops, peak_flops
        self.waited = 0.0  # seconds of waiting for data since the last reading
        self._since = time.perf_counter()
        self._read_at = trained
        self._first: float | None = None  # seconds of the first step; 0 after they were read

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        self._advance()
        yield
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def step_done(self) -> None:
        """Call it after each step. The first step compiles, so the means of `read` leave it out if there are others."""
        if self._first is None:
            self._advance()
            self._first = self.trained - self._read_at

    def read(self, steps: int) -> dict[str, float]:
        """Means over the `steps` since the last reading: tokens_per_s, step_ms, data_ms and mfu; and train_s in all."""
        self._advance()
        seconds = (self.trained - self._read_at) / steps
        if self._first and steps > 1:
            seconds = (self.trained - self._read_at - self._first) / (steps - 1)
        self._first = 0.0
        numbers = dict(tokens_per_s=self.tokens / seconds, step_ms=1e3 * seconds, data_ms=1e3 * self.waited / steps)
        if self.peak_flops:
            numbers["mfu"] = self.flops / seconds / self.peak_flops
        self._read_at, self.waited = self.trained, 0.0
        return numbers | dict(train_s=self.trained)

    def _advance(self) -> None:
        now = time.perf_counter()
        self.trained += now - self._since
        self._since = now


class MetricsFile:
    """metrics.jsonl: one record a line. Records after the step of a resume are deleted, because the run repeats it.

    A record that cannot be written, on a full disk for example, is kept in memory and written with the next one. Lines
    that are not records, such as one cut off by a crash, are moved to another file.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.waiting = b""  # records that are not written yet
        self.problem = ""  # why the last attempt failed
        content = path.read_bytes() if path.exists() else b""
        lines = [(line, record_in(line)) for line in content.splitlines(keepends=True) if line.strip()]
        unreadable = [line for line, record in lines if record is None]
        kept = [line for line, record in lines if record and record["step"] <= resume_step]
        if unreadable:
            copy = path.with_name(UNREADABLE)
            with open(copy, "ab") as f:
                f.write(b"".join(line.rstrip(b"\n") + b"\n" for line in unreadable))
            print(f"note: {path}: {len(unreadable)} lines are not records; they are in {copy.name} now")
        if len(kept) < len(lines) or (content and not content.endswith(b"\n")):
            write_durably(path, b"".join(line.rstrip(b"\n") + b"\n" for line in kept))

    def record(self, numbers: dict) -> str:
        """Write a record, after those that wait. Returns what a user must know of failed attempts."""
        self.waiting += json.dumps(numbers).encode() + b"\n"
        return self.write()

    def write(self, durably: bool = False) -> str:
        """Try to write the waiting records; durably: also flush the file to the disk. Returns as `record` does."""
        before = self.problem
        try:
            with open(self.path, "a+b", buffering=0) as f:  # each time, so a deleted file is made again
                if self.waiting:
                    self._append(f)
                if durably:
                    os.fsync(f.fileno())
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or str(error)
        if self.problem and self.problem != before:
            return f"{self.path}: {self.problem}; its records wait in memory until they can be written"
        return f"{self.path}: all records are written now" if before and not self.problem else ""

    def _append(self, f: Any) -> None:
        size = f.seek(0, os.SEEK_END)
        if size:
            f.seek(size - 1)
            if f.read(1) != b"\n":  # a crash has cut a line
                f.write(b"\n")
        while self.waiting:
            line, end, rest = self.waiting.partition(b"\n")
            before, unwritten = f.seek(0, os.SEEK_END), line + end
            try:
                while unwritten:  # a full disk takes a part, and fails with the reason at the rest
                    unwritten = unwritten[f.write(unwritten) :]
            except OSError:
                with suppress(OSError):
                    f.truncate(before)  # every line of the file is a record
                raise
            self.waiting = rest

    def close(self) -> str:
        """Try once more. Returns what is lost now; empty if nothing is."""
        self.write(durably=True)
        lost = self.waiting.count(b"\n")
        return f"{self.path}: the last {lost} records could not be written ({self.problem})" if lost else ""


class Wandb:
    """A copy of the records in Weights & Biases; offline, if the network fails at the start."""

    def __init__(self, folder: Path, config: LogConfig, run: dict, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("wandb is not installed (pip install wandb)") from None
        path = folder / WANDB_ID
        if not path.exists():  # the agent of a wandb sweep gives the run its id
            write_durably(path, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]).encode())
        project, mode = os.environ.get("WANDB_PROJECT", config.project), os.environ.get("WANDB_MODE", config.wandb)
        settings: dict[str, Any] = dict(project=project, name=name, id=path.read_text(), config=run)
        group = re.sub(r"-seed\d+", "", name)  # runs that differ only in the seed
        settings |= dict(dir=str(folder), resume="allow", group=group)
        try:
            self.run = wandb.init(**settings | dict(mode=mode))
        except Exception as error:
            print(f"wandb ({mode}) did not start: {error}")
            self.run = wandb.init(**settings | dict(mode="offline"))
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.run.define_metric("val_loss", step_metric="tokens", summary="min")

    def record(self, numbers: dict) -> None:
        self.run.log(numbers, step=numbers["step"])

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """A copy of the records as TensorBoard event files. Records after the step of a resume are purged."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard is not installed (pip install tensorboard)") from None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def record(self, numbers: dict) -> None:
        for key in numbers.keys() - {"step"}:
            self.writer.add_scalar(key, numbers[key], numbers["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class RunLogger:
    """Prints the lines of a run and hands its records to the backends. Only the main rank prints and records.

    On a terminal, the lines of training steps replace each other at the bottom, behind a progress bar. In a file, in a
    pipe and under torchrun they are ordinary lines.

    A backend is an object with `record(numbers)` and `close()`, which gets the entries of a record that are numbers.
    If it fails, the run continues without it. metrics.jsonl, the reference, is written as soon as that is possible.
    """

    def __init__(
        self, folder: Path, config: LogConfig, run: dict, name: str, steps: int, resume_step: int, world: World
    ) -> None:
        self.main = main = world.is_main
        self.backends: dict[str, Any] = {}
        self.lost = ""  # after `close`: which records could not be written
        self.metrics = MetricsFile(folder / METRICS, resume_step) if main else None
        disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
        if main and config.wandb not in ("off", "disabled") and not disabled:
            self._start("wandb", Wandb, folder, config, run, name)
        if main and config.tensorboard:
            self._start("tensorboard", TensorBoard, folder, resume_step)
        self.live = not world.launched and sys.stdout.isatty() and sys.stderr.isatty()
        form = "{percentage:3.0f}% |{bar:12}| {desc}"
        self._bar = tqdm(total=steps, initial=resume_step, bar_format=form, disable=not self.live)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main and text:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, numbers: dict, text: str) -> None:
        """Show `text` and hand a record, which includes "step", to the backends."""
        if self.live and "loss" in numbers:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(numbers["step"] - self._bar.n)
            self._bar.refresh()
        else:
            self.say(text)
        if self.metrics:
            self.say(self.metrics.record(numbers))
        plain = {key: value for key, value in numbers.items() if isinstance(value, int | float)}
        for name, backend in list(self.backends.items()):
            with self._optional(name):
                backend.record(plain)

    def flush(self) -> None:
        """Flush the records to the disk, so that a checkpoint does not outlive those before it."""
        if self.metrics:
            self.say(self.metrics.write(durably=True))

    def close(self) -> None:
        """End all backends."""
        self._bar.close()
        for name, backend in list(self.backends.items()):
            with self._optional(name):
                backend.close()
        if self.metrics:
            self.lost = self.metrics.close()

    def _start(self, name: str, backend: type, *arguments: object) -> None:
        with self._optional(name):
            self.backends[name] = backend(*arguments)

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no error of a backend may stop a run
            self.backends.pop(name, None)
            self.say(f"{name} failed ({error}); training continues without it")


def record_in(line: bytes) -> dict | None:
    """The record in a line of metrics.jsonl; None for any other line, such as one cut off by a crash."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. Other lines are skipped."""
    return [record for line in path.read_bytes().splitlines() if (record := record_in(line))]
