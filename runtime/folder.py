"""The run folder: a lock for one run at a time, and a check that a resumed run has the same configuration."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.distributed import World
from runtime.files import locked, write_durably, write_json
from runtime.logger import METRICS

CONFIG, ENVIRONMENT = "config.json", "environment.json"
INIT_SHA256 = "init_sha256"  # key of config.json: hash of the weights that --init_from has read


class RunFolderError(ValueError):
    """A run folder that cannot be used. The message names it and says what to do."""


@dataclass(frozen=True)
class Comparison:
    """How the configuration of a resumed run is compared with the one in its folder."""

    may_change: set[str]  # dotted keys that may differ
    defaults: dict[str, Any]  # the default of every dotted key, for runs that started before the key existed
    raw_dataset: str = ""  # fingerprint of the dataset as it would be without a manifest


@contextmanager
def run_lock(path: Path, world: World) -> Iterator[None]:
    """Lock a run folder for this run. Raises RunFolderError, on every rank, if another run uses it."""

    def lock() -> str | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
        except BlockingIOError:
            return f"{path} is in use by another process; wait for it, or give this run another --name"
        return None

    with ExitStack() as stack:
        _on_main(lock, path, world)
        yield


def open_run_folder(
    path: Path, config: dict, comparison: Comparison, environment: dict, fresh: bool, world: World
) -> None:
    """Create a run folder, or open an existing one to resume its run.

    config: the resolved configuration as nested dicts. fresh: rename an existing folder and start over.
    Raises RunFolderError, on every rank, if the folder cannot be written or contains a different run.
    """
    _on_main(lambda: _open(path, config, comparison, environment, fresh), path, world)


@contextmanager
def undone_on_error(path: Path, world: World) -> Iterator[None]:
    """Inside, a run is set up in its folder. If that fails, the folder has its former settings and checkpoints again.

    So a command with a wrong setting does not change what the corrected command finds.
    """
    present = {*path.glob("checkpoints/step_*"), *(path / name for name in (CONFIG, METRICS) if (path / name).exists())}
    settings = (path / CONFIG).read_bytes() if path / CONFIG in present else None
    try:
        yield
    except Exception:
        if world.is_main:
            for copy in set(path.glob("checkpoints/step_*")) - present:  # of the run that this one branches from
                shutil.rmtree(copy)
            for added in {path / CONFIG, path / METRICS} - present:
                added.unlink(missing_ok=True)
            if settings is not None and (path / CONFIG).read_bytes() != settings:
                write_durably(path / CONFIG, settings)
        raise


def _on_main(action: Callable[[], str | None], path: Path, world: World) -> None:
    """Run an action on rank 0. If it returns a problem or fails, raise RunFolderError on every rank."""
    problem = None
    if world.is_main:
        try:
            problem = action()
        except OSError as error:
            problem = f"run folder {path}: {error.strerror or error}; choose another with --log.folder"
    if problem := world.from_main(problem):
        raise RunFolderError(problem)


def _open(path: Path, config: dict, comparison: Comparison, environment: dict, fresh: bool) -> str | None:
    if fresh and path.exists():
        names = (path.with_name(f"{path.name}.before-{n}") for n in itertools.count(1))
        path.rename(next(p for p in names if not p.exists()))
    metrics, has_checkpoints = path / METRICS, any(path.glob("checkpoints/step_*"))
    started = has_checkpoints or (metrics.exists() and metrics.stat().st_size > 0)
    if started and (path / CONFIG).exists():
        try:
            before = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            changed = differences(before, config, comparison.defaults)
            config = config | {key: before[key] for key in (INIT_SHA256,) if key in before}
        except (ValueError, AttributeError):  # not JSON, or JSON that holds no settings
            return f"{path / CONFIG} is not readable; repair it, or start over with --fresh"
        if "dataset" in changed and changed["dataset"][0] == comparison.raw_dataset:
            del changed["dataset"]  # the shards got a manifest since the run started
        for key in sorted(_flat(before).keys() - _flat(config).keys()):
            print(f"note: {key}: this version has no such setting; the run started with it")
        allowed = {key: changed.pop(key) for key in changed.keys() & comparison.may_change}
        for key, (old, new) in sorted(allowed.items()):
            print(f"note: {key}: {old} -> {new}")
        if changed:
            lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changed.items())
            other_model = any(key.startswith("model.") for key in changed)
            return (
                f"{path} contains a run with another configuration (old -> new):\n{lines}\n"
                "give the old values to continue it, another --name for a new run, or --fresh to start over"
                + ("" if other_model else "; --accept_changes continues it with the new values")
            )
    elif has_checkpoints:
        return f"{path} has checkpoints and no {CONFIG}; restore it (state.json has it), or start over with --fresh"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG, config)
    write_json(path / ENVIRONMENT, environment)
    return None


def add_facts(path: Path, facts: dict, world: World, file: str = ENVIRONMENT) -> None:
    """Add facts that are decided at the start of a run to its environment.json, or to its config.json."""
    if world.is_main:
        write_json(path / file, json.loads((path / file).read_text(encoding="utf-8")) | facts)


def differences(before: dict, now: dict, defaults: dict[str, Any]) -> dict[str, tuple]:
    """Dotted keys whose values differ, as key: (before, now).

    A key that did not exist when the run started had its default value. A key that no longer exists is ignored.
    """
    before, now, defaults = json.loads(json.dumps([_flat(before), _flat(now), defaults]))
    before = defaults | before
    return {key: (before.get(key), now[key]) for key in sorted(now) if before.get(key) != now[key]}


def _flat(nested: dict, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
