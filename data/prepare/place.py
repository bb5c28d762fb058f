"""The place of a dataset folder: made in FOLDER.tmp, complete when it appears; only our own files are deleted."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.shards import MANIFEST, SPLITS, DataError, read_manifest
from runtime.files import locked as file_locked

PROGRESS, LOCK, FETCHED = "progress.json", "lock", "fetched"
_RECORDS = re.compile(r"(lock|progress\.json|manifest\.json|held-\d+)(\.tmp)?")
_SHARDS = re.compile(rf"({'|'.join(SPLITS)})_\d+\.bin(\.tmp)?")


def aside(out: Path) -> Path:
    """Where a dataset folder is made."""
    return out.with_name(out.name + ".tmp")


def progress(folder: Path) -> dict | None:
    """What an unfinished preparation wrote down: "source", and "files" if it fetches shards; None if nothing."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state["source"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; start over with --fresh") from None
    return state


def begun(folder: Path) -> dict | None:
    """The source that the preparation in a folder was begun with, finished or not; None if there is none."""
    state = progress(folder)
    if state is None and (folder / MANIFEST).exists():
        return read_manifest(folder / MANIFEST).get("source", {})
    return state["source"] if state else None


def refuse_strangers(folder: Path) -> None:
    """DataError if a folder holds anything that no preparation wrote there: it may not be written to or deleted."""
    listed, unfinished = {MANIFEST}, (folder / PROGRESS).exists()
    if unfinished:
        listed |= {FETCHED, *_files(folder)}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        source = manifest.get("source", {})
        if source.get("name") == "pretokenized" and "root" in source:
            raise DataError(f"{folder} holds shards that were indexed in place, not made here; give another --out")
        listed |= {e["file"] for split in SPLITS for e in manifest["splits"].get(split, [])}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        name = path.name
        if name not in listed and not _RECORDS.fullmatch(name) and not (unfinished and _SHARDS.fullmatch(name)):
            raise DataError(f"{path}: not a file of a preparation; move it away, or give another --out")


def _files(folder: Path) -> list[str]:
    try:
        return (progress(folder) or {}).get("files", [])
    except DataError:
        return []


def discard(folder: Path) -> None:
    """Delete a folder that a preparation made, manifest last. Raises DataError, with nothing done, for any other."""
    if not folder.exists():
        return
    refuse_strangers(folder)
    last = (MANIFEST, PROGRESS)
    for path in sorted(folder.iterdir(), key=lambda p: (p.name in last, p.name)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def settle(folder: Path, out: Path) -> None:
    """Make a complete folder the dataset `out`, in the place of one that may be there."""
    shutil.rmtree(folder / FETCHED, ignore_errors=True)
    for rest in (*folder.glob("held-*"), folder / PROGRESS, folder / LOCK):
        rest.unlink(missing_ok=True)
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
