"""What a run tells: a line on the console, a JSON line in metrics.jsonl, and the same numbers to wandb.

metrics.jsonl is the truth; wandb mirrors it, and its absence or outage never stops training.
"""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from optimizers.options import errors_of, option

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"


@dataclass(frozen=True)
class LogConfig:
    """Where the run folder is created, and where metrics go."""

    folder: str = option("runs", "folder in which run folders are created", on_resume="free")
    every: int = option(10, "steps between log lines", least=1, on_resume="free")
    wandb: Literal["online", "offline", "off"] = option("off", "mirror metrics to Weights & Biases", on_resume="free")
    project: str = option("gpt2", "wandb project", on_resume="free")

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        return errors_of(self)


class Meter:
    """Seconds spent training, evaluation and checkpoints left out, and seconds waited for data."""

    def __init__(self, trained: float = 0.0) -> None:
        self.trained = trained  # seconds in the life of the run, over all its restarts
        self.waited = 0.0  # seconds waited for data since the last reading
        self._since = time.perf_counter()
        self._read_at = trained

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time in here is not training."""
        self._advance()
        yield
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self) -> tuple[float, float]:
        """Training seconds and data seconds since the last reading."""
        self._advance()
        out = self.trained - self._read_at, self.waited
        self._read_at, self.waited = self.trained, 0.0
        return out

    def _advance(self) -> None:
        now = time.perf_counter()
        self.trained += now - self._since
        self._since = now


class RunLogger:
    """The records of one run. Silent on every rank but the main one.

    resume_step: records of later steps, which the checkpoint does not know, are dropped.
    """

    def __init__(
        self, folder: Path, config: LogConfig, run: dict, name: str, steps: int, resume_step: int, main: bool
    ) -> None:
        self.config, self.main, self._wandb, self._file, self._bar = config, main, None, None, None
        if not main:
            return
        self._open_metrics(folder / METRICS, resume_step)
        self._bar = tqdm(total=steps, initial=resume_step, unit="step", disable=not sys.stderr.isatty())
        if config.wandb != "off":
            self._start_wandb(folder, run, name)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, numbers: dict, text: str) -> None:
        """Keep a record (with "step"), mirror it to wandb, and print `text`."""
        if not self.main:
            return
        self.say(text)
        self._bar.update(numbers["step"] - self._bar.n)
        try:
            if self._file:
                self._file.write(json.dumps(numbers) + "\n")
        except OSError as error:
            self.say(f"{METRICS} can no longer be written ({error.strerror}); training goes on without it")
            self._file = None
        if self._wandb is not None:
            try:
                self._wandb.log(numbers, step=numbers["step"])
            except Exception as error:
                self.say(f"wandb stopped listening ({error}); training goes on, {METRICS} has everything")
                self._wandb = None

    def close(self) -> None:
        if not self.main:
            return
        self._bar.close()
        if self._file:
            self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self.say(f"wandb did not finish cleanly: {error}")

    def _open_metrics(self, path: Path, resume_step: int) -> None:
        try:
            kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if path.exists() else []
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            aside.replace(path)
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  a line at a time
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}); training goes on without it", file=sys.stderr)

    def _start_wandb(self, folder: Path, run: dict, name: str) -> None:
        for mode in dict.fromkeys((self.config.wandb, "offline")):
            try:
                import wandb

                path = folder / WANDB_ID
                if not path.exists():
                    path.write_text(uuid.uuid4().hex[:12])
                settings = dict(project=self.config.project, name=name, id=path.read_text(), resume="allow", config=run)
                self._wandb = wandb.init(mode=mode, dir=str(folder), **settings)
                return
            except ImportError:
                self.say("wandb is not installed (pip install wandb); training goes on without it")
                return
            except Exception as error:  # whatever it is, it must not stop a run
                self.say(f"wandb ({mode}) did not start: {error}")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that are none, such as one torn by a crash, are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records
