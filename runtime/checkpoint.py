"""Checkpoints: plain tensors and JSON, complete or absent.

    checkpoints/step_0001000/model.safetensors         the weights, by parameter name
                             average.safetensors       with --ema: the averaged weights, by parameter name
                             optimizer-0.safetensors   the optimizer state that rank 0 writes, "parameter/key"
                             state.json                step, losses, config, sha256 of each file

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a folder with its final name is
complete. The hashes reveal later damage.

A thread writes the files. With `background`, training continues meanwhile and the thread writes a copy of the
tensors. Only the main threads of the ranks communicate: after all ranks have written their files, the folder is
renamed between two steps.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizers.options import errors_of, option
from runtime.command import first_line
from runtime.distributed import ALONE, Exchange, World
from runtime.files import sha256_of, sync, write_json

MODEL, AVERAGE, STATE = "model.safetensors", "average.safetensors", "state.json"
STEP_OF_RUN = re.compile(r"(.+)@(\d+)")  # names a checkpoint: runs/NAME@600
FAILURES = (OSError, RuntimeError, MemoryError, SafetensorError)  # the errors that cost a checkpoint and not the run


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep."""

    every: int = option(1000, "steps between checkpoints; the last step is always saved", least=1, on_resume="free")
    keep: int = option(2, "recent checkpoints to keep, in addition to the best one", least=1, on_resume="free")
    milestone_every: int = option(0, "also save, and keep, every so many steps; 0: none", least=0, on_resume="free")
    background: bool = option(False, "write checkpoints on a thread, from a copy in host memory", on_resume="free")

    @property
    def intervals(self) -> tuple[int, ...]:
        """A checkpoint is due every so many steps, for each of these."""
        return (self.every, self.milestone_every) if self.milestone_every else (self.every,)

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        return errors_of(self)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names it and the reason."""


@dataclass
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    state: dict

    def model(self) -> dict[str, Tensor]:
        """The weights by parameter name."""
        return load_file(self.folder / MODEL)

    def average(self) -> dict[str, Tensor] | None:
        """The averaged weights by parameter name; None if the run keeps no average."""
        return load_file(self.folder / AVERAGE) if AVERAGE in self.state["sha256"] else None

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer state of all ranks, "parameter/key". The tensors are memory-mapped: only use reads them."""
        files = [load_file(self.folder / name) for name in self.state["sha256"] if name not in (MODEL, AVERAGE)]
        return {key: tensor for tensors in files for key, tensor in tensors.items()}


@dataclass
class PendingSave:
    """A checkpoint that is being written."""

    temporary: Path
    final: Path
    state: dict
    written: Future  # of this rank: the sha256 by file name


class Checkpointer:
    """Writes, deletes and finds the checkpoints of one run.

    In the background, each rank copies the tensors it writes into host memory: its optimizer state and, on rank 0,
    the weights and their average. This memory is allocated at the first save and used again. On a machine with a GPU
    it is page-locked, and the allocator may round each tensor up to a power of two. If a rank dies during a write,
    only the temporary folder remains.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.copies: dict[str, dict[str, Tensor]] = {}  # the host memory for background saves, by file and tensor
        self._pending: PendingSave | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._unfinished = Exchange(world)

    def save(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: dict,
        average: Mapping[str, Tensor] | None = None,
    ) -> Path | None:
        """Write the checkpoint of state["step"]. Called by every rank, with the optimizer tensors that it writes.

        Returns the folder. In the background it returns None, and `poll` or `finish` return the folder later. Waits
        for the previous checkpoint first.
        Raises CheckpointError on every rank if one rank could not write. Earlier checkpoints are untouched.
        """
        self.finish()
        final = self.folder / f"step_{state['step']:07d}"
        temporary = self.folder / f"tmp-{final.name}"
        files: dict[str, Mapping[str, Tensor]] = {}
        if self.world.is_main:
            files = {MODEL: model} | ({AVERAGE: average} if average else {})
        if optimizer:
            files[f"optimizer-{self.world.rank}.safetensors"] = optimizer
        problem = None
        try:
            if self.config.background:
                files = self._copied(files)
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        except FAILURES as error:
            problem = first_line(error)
        self._raise_if_any(self.world.gather(problem), state, temporary)
        self._pending = PendingSave(temporary, final, state, self._thread.submit(_write_files, temporary, files))
        return None if self.config.background else self.finish()

    def poll(self) -> Path | None:
        """Finish the pending checkpoint if every rank has written its files; else return None at once.

        Called by every rank after every step. With several ranks it answers one step late. Raises as `save` does.
        """
        if self._pending is None or self._unfinished.any(not self._pending.written.done()) is not False:
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the pending checkpoint and return its folder; None if there is none. Called by every rank.

        Raises as `save` does.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        self._unfinished.close()
        hashes, problem = {}, None
        try:
            hashes = pending.written.result()
        except FAILURES as error:
            problem = first_line(error)
        reports = self.world.gather((hashes, problem))
        problems = [problem for _, problem in reports]
        if self.world.is_main and not any(problems):
            try:
                self._publish(pending, {name: digest for hashes, _ in reports for name, digest in hashes.items()})
            except OSError as error:
                problems = [str(error)]
        self._raise_if_any(problems, pending.state, pending.temporary)
        return pending.final

    def _raise_if_any(self, problems: list[str | None], state: dict, temporary: Path) -> None:
        """If rank 0 knows a problem, delete the temporary folder and raise the problem on every rank."""
        problem = next(filter(None, problems), None)
        if problem and self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if problem := self.world.from_main(problem):
            raise CheckpointError(f"checkpoint of step {state['step']} could not be written: {problem}")

    def _copied(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
        """Copies of the present tensors in the memory that is kept for them."""
        gpu = self.world.device.type == "cuda"
        out: dict[str, Mapping[str, Tensor]] = {}
        for name, tensors in files.items():
            copies = self.copies.setdefault(name, {})
            for key, t in tensors.items():
                if key not in copies or copies[key].shape != t.shape or copies[key].dtype != t.dtype:
                    copies[key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=gpu)
                copies[key].copy_(t.detach(), non_blocking=True)
            out[name] = {key: copies[key] for key in tensors}
        if gpu:
            torch.cuda.current_stream(self.world.device).synchronize()  # the next step changes the tensors
        return out

    def _publish(self, pending: PendingSave, hashes: dict[str, str]) -> None:
        """Complete a written checkpoint and give it its final name."""
        write_json(pending.temporary / STATE, {**pending.state, "sha256": hashes})
        sync(pending.temporary)
        shutil.rmtree(pending.final, ignore_errors=True)
        pending.temporary.rename(pending.final)
        sync(self.folder)
        self._prune(pending.state["step"])

    def _prune(self, newest: int) -> None:
        """Delete all checkpoints except the latest `keep`, the best one, and milestones.

        newest: the step that was just written. Folders of later steps are damaged checkpoints that a resume skipped.
        They do not count and are not deleted.
        """
        found = {path: _read_state(path) for path in self._folders()}
        states = {path: s for path, s in found.items() if s and s["step"] <= newest}
        losses = {path: s["val_loss"] for path, s in states.items() if s.get("val_loss") is not None}
        kept = set(list(states)[: self.config.keep])
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        if every := self.config.milestone_every:
            kept |= {path for path, s in states.items() if s["step"] % every == 0}
        for path in states.keys() - kept:
            shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        found = [p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, the same on every rank. Damaged ones are named and not changed.

        None if there is none at all. Raises CheckpointError if there are some and all are damaged.
        """
        chosen: Path | None = None
        folders = self._folders() if self.world.is_main else []
        for folder in folders:
            if (problem := damage(folder)) is None:
                chosen = folder
                break
            print(f"checkpoint {folder} is damaged ({problem}); trying the one before it", file=sys.stderr)
        chosen, any_exist = self.world.from_main((chosen, bool(folders)))
        if any_exist and chosen is None:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; repair one, or start the training over with --fresh"
            )
        return Checkpoint(chosen, _read_state(chosen) or {}) if chosen else None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint folder, that of "RUN@STEP", or the newest good one of a run folder.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if not path.exists() and STEP_OF_RUN.fullmatch(str(path)):
        path = step_folder(str(path))
    if (path / STATE).exists():
        if problem := damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged ({problem}); use another one of this run")
        return Checkpoint(path, _read_state(path) or {})
    found = Checkpointer(path / "checkpoints", CheckpointConfig(), ALONE).latest()
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint (no {STATE}) nor a run folder with one")
    return found


def step_folder(source: str) -> Path:
    """The checkpoint folder of "RUN@STEP". Raises CheckpointError, which lists the nearest steps, if there is none."""
    match = STEP_OF_RUN.fullmatch(source)
    path, step = match.groups() if match else (source, "0")
    folder = Path(path).expanduser() / "checkpoints" / f"step_{int(step):07d}"
    if match and folder.is_dir():
        return folder
    kept = sorted(int(p.name[5:]) for p in folder.parent.glob("step_*") if p.name[5:].isdigit())
    near = sorted(kept, key=lambda s: abs(s - int(step)))[:5] if match else kept[-5:]
    has = f"nearest steps: {', '.join(map(str, sorted(near)))}" if near else "it has none"
    problem = f"no checkpoint {folder}" if match else "names no step"
    raise CheckpointError(f"{source}: {problem}; give RUN@STEP with a step that was kept ({has})")


def branch_origin(source: str, run_folder: Path, fresh: bool, world: World) -> Path | None:
    """The checkpoint "RUN@STEP" that a run branches from; None if its folder has a checkpoint already.

    fresh: the run starts over in a new folder. Raises CheckpointError on every rank if there is no such checkpoint, or
    it is damaged.
    """
    origin = problem = None
    if world.is_main and (fresh or not any(run_folder.glob("checkpoints/step_*"))):
        try:
            origin = step_folder(source)
            if reason := damage(origin):
                problem = f"branch_from={source}: {origin} is damaged ({reason})"
        except CheckpointError as error:
            problem = f"branch_from={error}"
    origin, problem = world.from_main((origin, problem))
    if problem:
        raise CheckpointError(problem)
    return origin


def start_branch(origin: Path, run_folder: Path, world: World) -> None:
    """Copy a checkpoint of another run, and that run's metrics, into a run folder without checkpoints."""
    if world.is_main:
        final, metrics = run_folder / "checkpoints" / origin.name, origin.parent.parent / "metrics.jsonl"
        temporary = final.with_name(f"tmp-{final.name}")
        shutil.copytree(origin, temporary, dirs_exist_ok=True)
        if metrics.exists():  # the logger drops the records after this step
            shutil.copy(metrics, run_folder)
        temporary.rename(final)
    world.from_main(None)  # the other ranks wait


def damage(folder: Path) -> str | None:
    """The damage of a checkpoint folder, or None: state.json must be readable and every hash must match."""
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
    """The state.json of a checkpoint folder; None if it is missing or not one of ours."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        good = type(state["step"]) is int and state["step"] >= 0 and isinstance(state["config"], dict)
        return state if good and MODEL in state["sha256"] and isinstance(state["sha256"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write files of tensors into a folder; returns the sha256 of each."""
    return {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, flush them to the disk, and return the file's sha256."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    sync(path)
    return sha256_of(path)
