"""Checkpoints: plain tensors and JSON, complete or absent.

    checkpoints/step_0001000/model.safetensors         the weights, by parameter name
                             optimizer-0.safetensors   optimizer state held by rank 0, "parameter/key"
                             state.json                step, losses, config, sha256 of each file

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a folder with its final name is
complete. Damage that happens later is found by the hashes.

In the background a thread writes the files from a copy of the tensors while training goes on. Only the main threads
of the ranks communicate: once all ranks have written, the folder is renamed between two steps.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizers.options import errors_of, option
from runtime.distributed import ALONE, Exchange, World
from runtime.files import sha256_of, sync, write_json

MODEL, STATE = "model.safetensors", "state.json"
FAILURES = (
    OSError,
    RuntimeError,
    MemoryError,
    SafetensorError,
)  # a write that fails so costs a checkpoint, not the run


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = option(1000, "steps between checkpoints; the last step is always saved", least=1, on_resume="free")
    keep: int = option(
        2, "number of recent checkpoints to keep, in addition to the best one", least=1, on_resume="free"
    )
    milestone_every: int = option(0, "keep every checkpoint at a multiple of this; 0: none", least=0, on_resume="free")
    background: bool = option(False, "write checkpoints on a thread, from a copy in host memory", on_resume="free")

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        return errors_of(self)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names it and the reason."""


class OptimizerTensors(Mapping):
    """The optimizer tensors of a checkpoint, "parameter/key", read from their files one by one when asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._file = {}
        for path in files:
            with safe_open(path, framework="pt") as f:
                self._file |= dict.fromkeys(f.keys(), path)

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self._file[key], framework="pt") as f:
            return f.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


@dataclass
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict

    def model(self) -> dict[str, Tensor]:
        """The weights by parameter name."""
        return load_file(self.folder / MODEL)

    def optimizer(self) -> OptimizerTensors:
        """The optimizer state of all ranks."""
        return OptimizerTensors([self.folder / name for name in self.state["sha256"] if name != MODEL])


@dataclass
class PendingSave:
    """A checkpoint that is being written."""

    temporary: Path
    final: Path
    state: dict
    written: Future  # of this rank: the sha256 by file name


class Checkpointer:
    """Writes, prunes and finds the checkpoints of one run.

    In the background, each rank copies the tensors it writes into host memory that is allocated at the first save and
    used again: its optimizer state and, on rank 0, the weights. On a machine with a GPU the memory is page-locked, and
    the allocator may round each tensor up to a power of two. If a rank dies during a write, nothing but the temporary
    folder remains.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._pending: PendingSave | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._unfinished = Exchange(world)
        self._copies: dict[str, dict[str, Tensor]] = {}  # by file

    def save(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: dict) -> Path | None:
        """Write the checkpoint of state["step"]. Called by every rank with the optimizer tensors it has to write.

        Returns its folder. In the background it returns None, and `poll` or `finish` return the folder later. Waits
        for the previous checkpoint first.
        Raises CheckpointError, on every rank, if one rank could not write; earlier checkpoints are untouched.
        """
        self.finish()
        final = self.folder / f"step_{state['step']:07d}"
        temporary = self.folder / f"tmp-{final.name}"
        problem = None
        try:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        if problem := self.world.from_main(problem):
            raise _not_written(state, problem)
        files = {MODEL: model} if self.world.is_main else {}
        if optimizer:
            files[f"optimizer-{self.world.rank}.safetensors"] = optimizer
        self._pending = PendingSave(temporary, final, state, self._start(temporary, files))
        return None if self.config.background else self.finish()

    def poll(self) -> Path | None:
        """Finish the pending checkpoint if every rank has written its files; else return None at once.

        Called by every rank after every step; on several ranks it answers one step late. Raises as `save` does.
        """
        if self._pending is None or self._unfinished.any(not self._pending.written.done()) is not False:
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the pending checkpoint; returns its folder, or None if there is none. Called by every rank.

        Raises as `save` does.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        self._unfinished.close()
        try:
            files, problem = pending.written.result(), None
        except FAILURES as error:
            files, problem = {}, str(error) or type(error).__name__
        reports = self.world.gather((files, problem))
        problem = next((p for _, p in reports if p), None)
        if self.world.is_main:
            if problem is None:
                hashes = {name: digest for written, _ in reports for name, digest in written.items()}
                problem = self._commit(pending.temporary, pending.final, {**pending.state, "sha256": hashes})
            if problem is not None:
                shutil.rmtree(pending.temporary, ignore_errors=True)
        if problem := self.world.from_main(problem):
            raise _not_written(pending.state, problem)
        return pending.final

    def _start(self, temporary: Path, files: dict[str, Mapping[str, Tensor]]) -> Future:
        """Write this rank's files, in the background if the config says so."""
        written: Future = Future()
        try:
            if self.config.background:
                return self._thread.submit(_write_files, temporary, self._copied(files))
            written.set_result(_write_files(temporary, files))
        except FAILURES as error:
            written.set_exception(error)
        return written

    def _copied(self, files: dict[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of the tensors as they are now, in the memory kept for them."""
        gpu, out = self.world.device.type == "cuda", {}
        for name, tensors in files.items():
            copies = self._copies.setdefault(name, {})
            for key, t in tensors.items():
                if key not in copies or copies[key].shape != t.shape or copies[key].dtype != t.dtype:
                    copies[key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=gpu)
                copies[key].copy_(t.detach(), non_blocking=True)
            out[name] = {key: copies[key] for key in tensors}
        if gpu:
            torch.cuda.current_stream(self.world.device).synchronize()  # the next step changes what is being copied
        return out

    def _commit(self, temporary: Path, final: Path, state: dict) -> str | None:
        try:
            write_json(temporary / STATE, state)
            sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(self.folder)
            self._prune(state["step"])
        except OSError as error:
            return str(error)
        return None

    def _prune(self, newest: int) -> None:
        """Delete checkpoints that are not among the latest `keep`, not the best, and no milestone.

        newest: the step just written. Folders of later steps are damaged checkpoints that a resume passed over; they
        do not count and stay.
        """
        states = {path: _read_state(path) for path in self._folders()}
        states = {path: s for path, s in states.items() if s and s["step"] <= newest}
        losses = {path: s["val_loss"] for path, s in states.items() if s.get("val_loss") is not None}
        kept = set(list(states)[: self.config.keep])
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        for path, state in states.items():
            every = self.config.milestone_every
            if path not in kept and not (every and state["step"] % every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        found = [p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, the same on every rank; damaged ones are named and left alone.

        None if there is none at all. Raises CheckpointError if there are some and all are damaged.
        """
        chosen, folders = None, self._folders() if self.world.is_main else []
        for folder in folders:
            problem = damage(folder)
            if problem is None:
                chosen = folder
                break
            print(f"checkpoint {folder} is damaged ({problem}); trying the one before it", file=sys.stderr)
        chosen, any_there = self.world.from_main((chosen, bool(folders)))
        if any_there and chosen is None:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; repair one, or start over with --fresh"
            )
        return Checkpoint(chosen, _read_state(chosen)) if chosen else None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint folder, or the newest good one of a run folder. Raises CheckpointError if there is none."""
    path = Path(path)
    if (path / STATE).exists():
        if problem := damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged ({problem}); use another one of this run")
        return Checkpoint(path, _read_state(path))
    found = Checkpointer(path / "checkpoints", CheckpointConfig(), ALONE).latest()
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint (no {STATE}) nor a run folder with one")
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: state.json must parse and every hash must match."""
    state = _read_state(folder)
    if state is None:
        return f"{STATE} is missing or unreadable"
    for name, digest in state["sha256"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return None


def _read_state(folder: Path) -> dict | None:
    """The state.json of a checkpoint folder; None if it is not there or not one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        good = type(state["step"]) is int and state["step"] >= 0 and isinstance(state["config"], dict)
        return state if good and MODEL in state["sha256"] and isinstance(state["sha256"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _not_written(state: dict, problem: str) -> CheckpointError:
    return CheckpointError(f"checkpoint of step {state['step']} could not be written: {problem}")


def _write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write files of tensors into a folder; returns the sha256 of each."""
    return {name: _write_tensors(folder / name, tensors) for name, tensors in files.items()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, flush them to the disk, and return the file's sha256."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    sync(path)
    return sha256_of(path)
