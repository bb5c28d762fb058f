"""The run folder: a name nobody else uses, and a refusal to continue another run in it."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.distributed import World

CONFIG, ENVIRONMENT = "config.json", "environment.json"


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message names it and the remedy."""


@contextmanager
def run_lock(path: Path, world: World) -> Iterator[None]:
    """Hold a run folder for this run. Raises RunFolderError, on every rank, if another run holds it."""
    problem, handle = None, None
    if world.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  held until the run ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            handle = None  # the other run's, not to be removed
            problem = f"{path} is in use by another process; wait for it, or give this run another --name"
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems know no locks
                problem = f"run folder {path}: {error.strerror or error}; choose another with --log.folder"
    try:
        problem = world.from_main(problem)
        if problem is not None:
            raise RunFolderError(problem)
        yield
    finally:
        if handle is not None:
            Path(handle.name).unlink(missing_ok=True)
            handle.close()


def open_run_folder(path: Path, config: dict, free: set[str], environment: dict, fresh: bool, world: World) -> None:
    """Create a run folder, or enter the one that is there to continue its run.

    config: the resolved configuration as nested dicts; free: dotted keys that may differ from the
    folder's. fresh: move an existing folder aside and start over.
    Raises RunFolderError, on every rank, if the folder cannot be written or holds a different run.
    """
    problem = None
    if world.is_main:
        try:
            problem = _open(path, config, free, environment, fresh)
        except OSError as error:
            problem = f"run folder {path}: {error.strerror or error}; choose another with --log.folder"
    problem = world.from_main(problem)
    if problem is not None:
        raise RunFolderError(problem)


def _open(path: Path, config: dict, free: set[str], environment: dict, fresh: bool) -> str | None:
    if fresh and path.exists():
        aside = [path.with_name(f"{path.name}.before-{n}") for n in range(1, 1 + len(list(path.parent.iterdir())))]
        path.rename(next(p for p in aside if not p.exists()))
    if (path / CONFIG).exists():
        try:
            before = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            return f"{path / CONFIG} is not readable; repair it, or start over with --fresh"
        changed = differences(before, json.loads(json.dumps(config)), free)
        if changed:
            lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changed.items())
            return (
                f"{path} holds a run with another configuration (there -> now):\n{lines}\n"
                "give the old values to continue it, another --name to run beside it, or --fresh to start over"
            )
    elif any(path.glob("checkpoints/step_*")):
        return f"{path} has checkpoints and no {CONFIG}; put it back (state.json has it), or start over with --fresh"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name, content in ((CONFIG, config), (ENVIRONMENT, environment)):
        _write(path / name, content)
    return None


def add_facts(path: Path, facts: dict, world: World) -> None:
    """Add what the start of a run decided to its environment.json; a disk that fails does not stop the run."""
    if world.is_main:
        with suppress(OSError):
            _write(path / ENVIRONMENT, json.loads((path / ENVIRONMENT).read_text(encoding="utf-8")) | facts)


def _write(path: Path, content: dict) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def differences(before: dict, now: dict, free: set[str]) -> dict[str, tuple]:
    """Dotted keys whose values differ, without the free ones, as key: (before, now)."""
    a, b = _flat(before), _flat(now)
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if k not in free and a.get(k) != b.get(k)}


def _flat(nested: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
