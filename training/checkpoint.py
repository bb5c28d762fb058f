"""Checkpoints: plain tensors and JSON, complete or absent.

    checkpoints/step_0001000/model.safetensors         the weights, by parameter name
                             average.safetensors       with --ema: the averaged weights, by parameter name
                             optimizer-0.safetensors   the optimizer state that rank 0 writes, "parameter/key"
                             state.json                step, position in the data, losses, config, sha256 of each file

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a folder with its final name is
complete. If the step is saved a second time, the former folder is kept until the new one has the name. The hashes, one
of them of state.json itself, reveal later damage.

A thread writes the files. With `background`, training continues meanwhile and the thread writes a copy of the
tensors. Only the main threads of the ranks communicate: after all ranks have written their files, the folder is
renamed between two steps.
"""

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizers.options import errors_of, option
from optimizers.shards import load_whole
from optimizers.state import load_named_state
from runtime.command import first_line
from runtime.distributed import ALONE, DelayedAny, World
from runtime.errors import UserError
from runtime.files import (
    UNFINISHED,
    delete_folder,
    replace_folder,
    restore_folder,
    sha256_of,
    write_json,
    write_new,
)

MODEL, AVERAGE, STATE = "model.safetensors", "average.safetensors", "state.json"
FORMAT = 2  # version of the form of state.json
COUNTS, LOSSES = ("step", "tokens", "sequences"), ("val_loss", "best_val_loss", "train_seconds")  # keys of state.json
STEP_OF_RUN = re.compile(r"(.+)@(\d+)")  # names a checkpoint: runs/NAME@600
STEP_FOLDER = re.compile(r"(\.)?(?P<name>step_(?P<step>\d+))(?(1)\.replaced)")  # with a dot: see `replaced_name`
FAILURES = (OSError, RuntimeError, MemoryError, SafetensorError)  # errors that fail one checkpoint, not the run
DTYPES = {  # as the safetensors format names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep."""

    every: int = option(1000, "steps between checkpoints; the last step is always saved", least=1, on_resume="free")
    keep: int = option(2, "recent checkpoints to keep, in addition to the best one", least=1, on_resume="free")
    milestone_every: int = option(
        0, "steps between checkpoints that are always kept; 0: none", least=0, on_resume="free"
    )
    background: bool = option(False, "write checkpoints on a thread, from a copy in host memory", on_resume="free")

    @property
    def intervals(self) -> tuple[int, ...]:
        """Intervals in steps; a checkpoint is due at every multiple of one of them."""
        return (self.every, self.milestone_every) if self.milestone_every else (self.every,)

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        return errors_of(self)


class CheckpointError(UserError):
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
    written: Future  # the writing of this rank's files; gives their sha256 by name


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
        self._unfinished = DelayedAny(world)

    def save(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: dict,
        average: Mapping[str, Tensor] | None = None,
    ) -> Path | None:
        """Write the checkpoint of state["step"]. Every rank must call it, with the optimizer tensors that it writes.

        Returns the folder. In the background it returns None, and `poll` or `finish` return the folder later. Waits
        for the previous checkpoint first.
        Raises CheckpointError on every rank if one rank could not write. Earlier checkpoints are intact.
        """
        self.finish()
        final = self.folder / f"step_{state['step']:07d}"
        temporary = self.folder / (UNFINISHED + final.name)
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
                delete_folder(temporary)
                temporary.mkdir(parents=True)
        except FAILURES as error:
            problem = first_line(error)
        self._raise_if_any(self.world.gather(problem), state, temporary)
        self._pending = PendingSave(temporary, final, state, self._thread.submit(_write_files, temporary, files))
        return None if self.config.background else self.finish()

    def poll(self) -> Path | None:
        """Finish the pending checkpoint if every rank has written its files; else return None at once.

        Every rank must call it after every step. With several ranks it answers one step late. Raises as `save` does.
        """
        if self._pending is None or self._unfinished.any(not self._pending.written.done()) is not False:
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the pending checkpoint and return its folder; None if there is none. Every rank must call it.

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
            delete_folder(temporary)
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
        state = {"format": FORMAT, **pending.state, "sha256": hashes}
        write_json(pending.temporary / STATE, state | {"state_sha256": state_sha256(state)})
        replace_folder(pending.temporary, pending.final)
        self._prune(pending.state["step"])

    def _prune(self, newest: int) -> None:
        """Delete all checkpoints except the latest `keep`, the best one, and milestones.

        newest: the step that was just written. Folders of later steps are damaged checkpoints that a resume skipped.
        They do not count and are not deleted. Only losses measured on the same data as the newest one are compared.
        """
        found = {path: read_state(path)[0] for path in self._folders()}
        states = {path: s for path, s in found.items() if s and s["step"] <= newest}
        measured_on = next((s.get("measured_on") for s in states.values()), None)
        comparable = {path: s for path, s in states.items() if s.get("measured_on") == measured_on}
        losses = {path: s["val_loss"] for path, s in comparable.items() if s.get("val_loss") is not None}
        kept = set(list(states)[: self.config.keep])
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        if every := self.config.milestone_every:
            kept |= {path for path, s in states.items() if s["step"] % every == 0}
        for path in states.keys() - kept:
            delete_folder(path)

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first; the former folder of a step if only that exists."""
        found = {p: match for p in self.folder.glob("*step_*") if (match := STEP_FOLDER.fullmatch(p.name))}
        finals = {p: p.with_name(match["name"]) for p, match in found.items()}
        present = [p for p, final in finals.items() if p == final or not final.exists()]
        return sorted(present, key=lambda p: int(found[p]["step"]), reverse=True)

    def repair(self) -> None:
        """Finish or undo what a killed run left half done. Only the process that holds the run's lock may call it."""
        for path in sorted(self.folder.glob("*step_*")):
            if match := STEP_FOLDER.fullmatch(path.name):
                restore_folder(path.with_name(match["name"]))
        for unfinished in self.folder.glob(f"{UNFINISHED}*step_*"):  # another folder may be a user's
            delete_folder(unfinished)

    def latest(self, wanted: Collection[str] | None = None) -> Checkpoint | None:
        """The newest undamaged checkpoint, the same on every rank. Damaged ones are named and not changed.

        wanted: the files to check; None: all of them.
        None if there is none at all. Raises CheckpointError if there are some and all are damaged.
        """
        chosen: Path | None = None
        folders = self._folders() if self.world.is_main else []
        for folder in folders:
            if (problem := find_damage(folder, wanted)) is None:
                chosen = folder
                break
            print(f"checkpoint {folder} is damaged ({problem}); trying the one before it", file=sys.stderr)
        chosen, any_exist = self.world.from_main((chosen, bool(folders)))
        if any_exist and chosen is None:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; repair one, or start the training over with --fresh"
            )
        return checkpoint_in(chosen) if chosen else None


def open_checkpoint(path: str | Path, wanted: Collection[str] | None = None) -> Checkpoint:
    """Open a checkpoint folder, the checkpoint "RUN@STEP", or the newest undamaged one of a run folder.

    wanted: the files that are read and so must be checked; None: all of them. Raises CheckpointError if there is none.
    """
    path = Path(path)
    if not path.exists() and STEP_OF_RUN.fullmatch(str(path)):
        path = step_folder(str(path))
    if (path / STATE).exists():
        if problem := find_damage(path, wanted):
            raise CheckpointError(f"checkpoint {path} is damaged ({problem}); use another one of this run")
        return checkpoint_in(path)
    found = Checkpointer(path / "checkpoints", CheckpointConfig(), ALONE).latest(wanted)
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


def branch_origin(source: str, world: World) -> Path:
    """The checkpoint "RUN@STEP" that a run branches from.

    Raises CheckpointError on every rank if there is no such checkpoint, or it is damaged.
    """
    origin = problem = None
    if world.is_main:
        try:
            origin = step_folder(source)
            if reason := find_damage(origin):
                problem = f"branch_from={source}: {origin} is damaged ({reason})"
        except CheckpointError as error:
            problem = f"branch_from={error}"
    origin, problem = world.from_main((origin, problem))
    if problem or origin is None:
        raise CheckpointError(problem)
    return origin


def start_branch(origin: Path, run_folder: Path) -> None:
    """Copy a checkpoint of another run, and that run's metrics, into a run folder without checkpoints."""
    final, metrics = run_folder / "checkpoints" / origin.name, origin.parent.parent / "metrics.jsonl"
    temporary = final.with_name(UNFINISHED + final.name)
    delete_folder(temporary)
    shutil.copytree(origin, temporary)
    if metrics.exists():  # the logger drops the records after this step
        shutil.copy(metrics, run_folder)
    replace_folder(temporary, final)


def checkpoint_in(folder: Path) -> Checkpoint:
    """The checkpoint in a folder whose files are not checked. Raises CheckpointError if its state.json is damaged."""
    state, problem = read_state(folder)
    if state is None:
        raise CheckpointError(f"checkpoint {folder} is damaged ({problem}); use another one of this run")
    return Checkpoint(folder, state)


def load(found: Checkpoint, model: nn.Module, optimizer: Optimizer, name: str) -> None:
    """Load weights and optimizer state of a checkpoint. name: the run's optimizer.

    Raises CheckpointError if they do not fit.
    """
    try:
        load_whole(model, found.model())
        load_named_state(optimizer, model, found.optimizer())
    except (RuntimeError, ValueError) as error:
        reason, before = " ".join(str(error).split()), found.state["config"].get("optimizer")
        advice = "another version of the program wrote it, or its files do not belong together"
        if before != name:
            advice = f"its optimizer is {before}; --init_from starts a new run with the weights alone"
        raise CheckpointError(f"checkpoint {found.folder}: {reason}; {advice}") from None


def find_damage(folder: Path, wanted: Collection[str] | None = None) -> str | None:
    """What is damaged in a checkpoint folder; None if state.json is as written and every hash matches.

    wanted: the names of the files to check; None: all of them.
    """
    state, problem = read_state(folder)
    if state is None:
        return problem
    for name, digest in state["sha256"].items():
        path = folder / name
        if wanted is not None and name not in wanted:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} does not match its sha256"
    return None


def state_sha256(state: Mapping) -> str:
    """The sha256 of the content of a state.json."""
    content = {key: value for key, value in state.items() if key != "state_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> tuple[dict | None, str]:
    """The state.json of a checkpoint folder, or None and what is wrong with it."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or "step" not in state:
            raise ValueError("another content")
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not one of this program's"
        return None, f"{STATE} cannot be read: {reason}"
    if state.get("format") != FORMAT:
        return None, f"{STATE} has format {state.get('format', 1)!r}, and this version reads {FORMAT}"
    if state.get("state_sha256") != state_sha256(state):
        return None, f"{STATE} was changed: it does not match its own sha256"
    counts, losses = [state.get(k) for k in COUNTS], [state.get(k) for k in LOSSES]
    if any(type(n) is not int or n < 0 for n in counts) or any(type(x) not in (int, float, NoneType) for x in losses):
        return None, f"{STATE} holds something else than numbers under {', '.join((*COUNTS, *LOSSES))}"
    match, files = STEP_FOLDER.fullmatch(folder.name), state.get("sha256")
    if match and int(match["step"]) != state["step"]:
        return None, f"{STATE} is that of step {state['step']}"
    if not isinstance(files, dict) or MODEL not in files or any(Path(name).name != name for name in files):
        return None, f"{STATE} does not name the files of a checkpoint"
    return state, ""


def _write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write files of tensors into a folder; returns the sha256 of each."""
    return {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, flush it to the disk, and return its sha256.

    The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes. Its own library needs
    all tensors in host memory at once, and a second pass over the file for the hash; here one tensor is copied at a
    time.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so each one is aligned
    header, end = {}, 0
    for name, t in ordered:
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    contents = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in ordered)
    return write_new(path, itertools.chain((len(text).to_bytes(8, "little"), text), contents))
