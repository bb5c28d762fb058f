"""The run folder: a name nobody else uses, and a refusal to continue another run in it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.distributed import World
from runtime.files import locked, write_json

CONFIG, ENVIRONMENT = "config.json", "environment.json"


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message names it and the remedy."""


@contextmanager
def run_lock(path: Path, world: World) -> Iterator[None]:
    """Hold a run folder for this run. Raises RunFolderError, on every rank, if another run holds it."""
    problem = None
    with ExitStack() as stack:
        if world.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
            except BlockingIOError:
                problem = f"{path} is in use by another process; wait for it, or give this run another --name"
            except OSError as error:
                problem = f"run folder {path}: {error.strerror or error}; choose another with --log.folder"
        if problem := world.from_main(problem):
            raise RunFolderError(problem)
        yield


@dataclass(frozen=True)
class Comparison:
    """How the configuration of a continued run is compared with the one in its folder."""

    free: set[str]  # dotted keys that may differ
    defaults: dict[str, Any]  # of every dotted key: what a run meant that was started before the setting existed


def open_run_folder(
    path: Path, config: dict, comparison: Comparison, environment: dict, fresh: bool, world: World
) -> None:
    """Create a run folder, or enter the one that is there to continue its run.

    config: the resolved configuration as nested dicts. fresh: rename an existing folder and start over.
    Raises RunFolderError, on every rank, if the folder cannot be written or holds a different run.
    """
    problem = None
    if world.is_main:
        try:
            problem = _open(path, config, comparison, environment, fresh)
        except OSError as error:
            problem = f"run folder {path}: {error.strerror or error}; choose another with --log.folder"
    problem = world.from_main(problem)
    if problem is not None:
        raise RunFolderError(problem)


def _open(path: Path, config: dict, comparison: Comparison, environment: dict, fresh: bool) -> str | None:
    if fresh and path.exists():
        names = [path.with_name(f"{path.name}.before-{n}") for n in range(1, 1 + len(list(path.parent.iterdir())))]
        path.rename(next(p for p in names if not p.exists()))
    if (path / CONFIG).exists():
        try:
            before = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            return f"{path / CONFIG} is not readable; repair it, or start over with --fresh"
        changed = differences(before, json.loads(json.dumps(config)), comparison)
        if changed:
            lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changed.items())
            return (
                f"{path} holds a run with another configuration (there -> now):\n{lines}\n"
                "give the old values to continue it, another --name to run beside it, or --fresh to start over"
            )
    elif any(path.glob("checkpoints/step_*")):
        return f"{path} has checkpoints and no {CONFIG}; put it back (state.json has it), or start over with --fresh"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG, config)
    write_json(path / ENVIRONMENT, environment)
    return None


def add_facts(path: Path, facts: dict, world: World) -> None:
    """Add what was decided at the start of a run to its environment.json; a failing disk does not stop the run."""
    if world.is_main:
        with suppress(OSError):
            write_json(path / ENVIRONMENT, json.loads((path / ENVIRONMENT).read_text(encoding="utf-8")) | facts)


def differences(before: dict, now: dict, comparison: Comparison) -> dict[str, tuple]:
    """Dotted keys whose values differ, as key: (before, now), without those that may change.

    A setting that did not exist when the run was started had its default value; one that no longer exists is ignored.
    """
    a, b = _flat(before), _flat(now)
    a = json.loads(json.dumps(comparison.defaults)) | a
    return {k: (a.get(k), b[k]) for k in sorted(b) if k not in comparison.free and a.get(k) != b[k]}


def _flat(nested: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
