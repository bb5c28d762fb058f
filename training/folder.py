"""The run folder: a lock for one run at a time, and a check that a resumed run has the same configuration."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.distributed import World
from runtime.errors import UserError
from runtime.files import locked, write_json
from training.logger import METRICS

CONFIG, ENVIRONMENT = "config.json", "environment.json"
INIT_SHA256 = "init_sha256"  # key of config.json: hash of the weights that --init_from has read


class RunFolderError(UserError):
    """A run folder that cannot be used. The message names it and says what to do."""


@contextmanager
def run_lock(path: Path, world: World) -> Iterator[None]:
    """Lock a run folder for this run. Raises RunFolderError, on every rank, if another run uses it."""

    def lock() -> str | None:
        if path.parent.is_symlink() and not path.parent.exists():
            return f"log.folder={path.parent}: is a link to {os.readlink(path.parent)}, which does not exist"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
        except BlockingIOError:
            return f"{path} is in use by another process; wait for it, or give this run another --name"
        return None

    with ExitStack() as stack:
        on_main(lock, path, world)
        yield


def compare_settings(path: Path, settings: dict, may_change: set[str], defaults: dict[str, Any], world: World) -> None:
    """Compare the settings of a run with those in its folder, if it has started there. Changes no file.

    may_change: dotted keys that may differ. defaults: of every dotted key, for runs that are older than the key.
    Raises RunFolderError, on every rank, if the folder contains a different run.
    """
    on_main(lambda: _difference(path, settings, may_change, defaults), path, world)


def write_settings(path: Path, settings: dict, facts: dict, fresh: bool, world: World) -> None:
    """Create a run folder, or open an existing one. Call it only after all settings were checked.

    settings: the configuration as nested dicts. facts: about this start, such as versions. fresh: rename an existing
    folder and start over. Raises RunFolderError, on every rank, if the folder cannot be written.
    """

    def write() -> None:
        if fresh and path.exists():
            names = (path.with_name(f"{path.name}.before-{n}") for n in itertools.count(1))
            path.rename(next(p for p in names if not p.exists()))
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        kept = {}
        if (path / CONFIG).exists():
            with suppress(ValueError, AttributeError):  # that of a started run was checked before
                before = json.loads((path / CONFIG).read_text(encoding="utf-8"))
                kept = {key: before[key] for key in (INIT_SHA256,) if key in before}
        write_json(path / CONFIG, kept | settings)
        write_json(path / ENVIRONMENT, facts)

    on_main(write, path, world)


def on_main(action: Callable[[], str | None], path: Path, world: World) -> None:
    """Run an action on rank 0. If it returns a problem or fails, raise RunFolderError on every rank."""
    problem = None
    if world.is_main:
        try:
            problem = action()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            file = Path(str(error.filename or path))
            which = "" if file in (path, *path.parents) else f"{file}: "
            problem = f"run folder {path}: {which}{error.strerror or error}; choose another with --log.folder"
    if problem := world.from_main(problem):
        raise RunFolderError(problem)


def _difference(path: Path, settings: dict, may_change: set[str], defaults: dict[str, Any]) -> str | None:
    metrics, has_checkpoints = path / METRICS, any(path.glob("checkpoints/*step_*"))
    started = has_checkpoints or (metrics.exists() and metrics.stat().st_size > 0)
    if not started:
        return None
    if not (path / CONFIG).exists():
        missing = f"{path} has checkpoints and no {CONFIG}; restore it (state.json has it), or start over with --fresh"
        return missing if has_checkpoints else None
    try:
        before = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        changed = differences(before, settings, defaults)
    except (ValueError, AttributeError):  # not JSON, or JSON that holds no settings
        return f"{path / CONFIG} is not readable; repair it, or start over with --fresh"
    for key in sorted(_flat(before).keys() - _flat(settings).keys() - {INIT_SHA256}):
        print(f"note: {key}: this version has no such setting; the run started with it")
    allowed = {key: changed.pop(key) for key in changed.keys() & may_change}
    for key, (old, new) in sorted(allowed.items()):
        print(f"note: {key}: {old} -> {new}")
    if not changed:
        return None
    lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changed.items())
    other_model = any(key.startswith("model.") for key in changed)
    return (
        f"{path} contains a run with another configuration (old -> new):\n{lines}\n"
        "give the old values to continue it, another --name for a new run, or --fresh to start over"
        + ("" if other_model else "; --accept_changes continues it with the new values")
    )


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
