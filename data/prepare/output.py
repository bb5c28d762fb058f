"""The output folder. A dataset is made in FOLDER.tmp, which is renamed when it is complete.

Only files that a preparation made are ever deleted.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.prepare.verify import describe
from data.shards import MANIFEST, SPLITS, DataError, entries, read_manifest
from runtime.files import locked as file_locked

PROGRESS, LOCK, FETCHED = "progress.json", "lock", "fetched"
RECORDS = re.compile(r"(lock|(progress|manifest|tokenizer)\.json|held-\d+)(\.tmp)?")
SHARDS = re.compile(rf"({'|'.join(SPLITS)})_\d+\.bin(\.tmp)?")
PINNED = ("revision", "documents", "read")  # facts that the source adds to the settings


def temporary(out: Path) -> Path:
    """Folder in which a dataset is made."""
    return out.with_name(out.name + ".tmp")


def progress(folder: Path) -> dict | None:
    """What an unfinished preparation recorded: "source", and "files" if it fetches shards; None without a record."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state["source"], dict) or not isinstance(state.get("files", []), list):
            raise TypeError("another structure than this program writes")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); delete its folder") from None


def recorded_source(folder: Path) -> dict | None:
    """The settings and facts of the preparation in a folder, finished or not; None if there is none."""
    if state := progress(folder):
        return state["source"]
    return read_manifest(folder / MANIFEST).get("source", {}) if (folder / MANIFEST).exists() else None


def refuse_foreign_files(folder: Path) -> None:
    """DataError for a folder with a file that no preparation made: it must not be written to or deleted."""
    if not folder.exists():
        return
    state = progress(folder)
    known = {FETCHED, *state.get("files", [])} if state else set()
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        source = manifest.get("source", {})
        if source.get("name") == "pretokenized" and "root" in source:
            raise DataError(f"{folder} holds shards that were indexed in place, not made here; give another --out")
        known |= {e["file"] for e in entries(manifest)}
    for path in sorted(folder.iterdir()):
        if path.name in known or RECORDS.fullmatch(path.name) or (state and SHARDS.fullmatch(path.name)):
            continue
        raise DataError(f"{path}: not a file of a preparation; move it away, or give another --out")


def unfinished(out: Path, settings: dict, fresh: bool) -> dict | None:
    """What an unfinished preparation of `out` recorded of its source, {} if there is none, None if `out` is complete.

    fresh: delete an unfinished preparation; a complete one will be replaced.
    Raises DataError if the folder holds something else, or a preparation with other settings.
    """
    folder = temporary(out)
    refuse_foreign_files(folder)
    if fresh:
        refuse_foreign_files(out)
        if folder.exists():
            with locked(folder):
                discard(folder)
        return {}
    before = recorded_source(folder)
    if before is not None:
        if different := changed(before, settings):
            raise DataError(f"{folder} was started with other settings ({different}); repeat them or give --fresh")
        if not (folder / MANIFEST).exists():
            print(f"continuing {folder}")
            return before
        with staged(out):
            pass  # it is complete and needs only its name
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    before = recorded_source(out)
    if before is None:
        raise DataError(f"{out} exists and has no {MANIFEST}: not a dataset made here; give another --out")
    if different := changed(before, settings):
        refuse_foreign_files(out)
        raise DataError(f"{out} exists with other settings ({different}); give --fresh to replace it")
    print(f"already prepared: {describe(out)}")
    return None


def changed(before: dict, now: dict) -> str:
    """Names of the settings that differ."""
    return ", ".join(sorted(k for k in before | now if k not in PINNED and before.get(k) != now.get(k)))


def discard(folder: Path) -> None:
    """Delete a folder that a preparation made. Raises DataError, and deletes nothing, for any other folder."""
    refuse_foreign_files(folder)
    if folder.exists():
        shutil.rmtree(folder / FETCHED, ignore_errors=True)
        # The records go last. If this is interrupted, they still show that the other files are ours.
        for path in sorted(folder.iterdir(), key=lambda p: p.name in (MANIFEST, PROGRESS)):
            path.unlink()
        folder.rmdir()


def publish(folder: Path, out: Path) -> None:
    """Rename a complete folder to `out`, and replace a dataset that may be there."""
    shutil.rmtree(folder / FETCHED, ignore_errors=True)
    for record in (*folder.glob("held-*"), folder / PROGRESS, folder / LOCK):
        record.unlink(missing_ok=True)
    discard(out)
    folder.rename(out)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second preparation out of a folder."""
    try:
        with file_locked(folder / LOCK):
            yield
    except BlockingIOError:
        raise DataError(f"{folder}: another preparation is writing there; wait for it or give another --out") from None


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """The temporary folder of a dataset, locked for writing, which becomes `out` at the end."""
    folder = temporary(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield folder
        publish(folder, out)
