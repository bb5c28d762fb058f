"""The output folder. A dataset is made in FOLDER.tmp, which gets the name FOLDER when it is complete.

Only files that a preparation made are ever deleted. Its first file is progress.json, and its last one manifest.json. So
a folder without either is not ours. Files whose names begin with a dot are ignored and never deleted.
"""

import json
import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from data.prepare.verify import describe
from data.shards import MANIFEST, SPLITS, DataError, files_of, read_manifest, visible
from runtime.files import locked as file_locked
from runtime.files import replace_folder, replaced_name, restore_folder, was_replaced, write_durably

PROGRESS, FETCHED = "progress.json", "fetched"
OURS = re.compile(
    rf"((progress|manifest|tokenizer)\.json|buffered-\d+|({'|'.join(SPLITS)})_\d+\.bin)(\.tmp)?|{FETCHED}"
)
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
        source = state["source"]
        kinds = (source, dict), (state.get("files", []), list), (source.get("revision", ""), str)
        if not all(isinstance(value, kind) for value, kind in (*kinds, (source.get("documents", 0), int))):
            raise TypeError("another structure than this program writes")
        return state
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    state, known = progress(folder), {PROGRESS + ".tmp"}
    if state:
        known |= set(state.get("files", []))
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        source = manifest.get("source", {})
        if source.get("name") == "pretokenized" and "root" in source:
            raise DataError(f"{folder} holds shards that were indexed in place, not made here; give another --out")
        known |= files_of(manifest)
    for path in visible(folder):
        if path.name not in known and not (state and OURS.fullmatch(path.name)):
            raise DataError(f"{path}: not a file of a preparation; move it away, or give another --out")


def is_prepared(out: Path, settings: dict) -> bool:
    """Whether `out` is a complete dataset with these settings. If so, prints a line.

    Raises DataError if the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not visible(out)):
        return False
    before = recorded_source(out)
    if before is None:
        raise DataError(f"{out} exists and has no {MANIFEST}: not a dataset made here; give another --out")
    if different := changed(before, settings):
        refuse_foreign_files(out)
        raise DataError(f"{out} exists with other settings ({different}); give --fresh to replace it")
    print(f"already prepared: {describe(out)}")
    return True


def unfinished(out: Path, settings: dict, fresh: bool) -> dict | None:
    """What an unfinished preparation of `out` recorded of its source, {} if there is none, None if `out` is complete.

    fresh: delete an unfinished preparation; a complete one will be replaced.
    Raises DataError if the folder holds something else, or a preparation with other settings.
    """
    refuse_foreign_files(replaced_name(out))
    restore_folder(out)
    folder = temporary(out)
    refuse_foreign_files(folder)
    if fresh:
        refuse_foreign_files(out)
        discard(folder)
        return {}
    before = recorded_source(folder)
    if before is not None:
        if different := changed(before, settings):
            raise DataError(f"{folder} was started with other settings ({different}); repeat them or give --fresh")
        if not (folder / MANIFEST).exists():
            print(f"continuing {folder}")
            return before
        publish(folder, out)  # it is complete and needs only its name
    return None if is_prepared(out, settings) else {}


def is_interrupted(out: Path) -> bool:
    """Whether a preparation of `out` or its replacement has to be continued."""
    return temporary(out).exists() or was_replaced(out)


def changed(before: dict, now: dict) -> str:
    """Names of the settings that differ."""
    return ", ".join(sorted(k for k in before | now if k not in PINNED and before.get(k) != now.get(k)))


def begin(out: Path, state: dict) -> Path:
    """The folder in which `out` is made; state: the first content of progress.json, if it has none."""
    folder = temporary(out)
    folder.mkdir(exist_ok=True)
    if not (folder / PROGRESS).exists():
        write_durably(folder / PROGRESS, (json.dumps(state) + "\n").encode())
    return folder


def discard(folder: Path, kept: Set[str] = frozenset()) -> None:
    """Delete what a preparation made in a folder, except the kept names, and then the folder, if it is empty.

    Raises DataError, and deletes nothing, if a file is not ours.
    """
    refuse_foreign_files(folder)
    if folder.exists():
        # The records go last. If this is interrupted, they still show that the other files are ours.
        for path in sorted(visible(folder), key=lambda p: p.name in (MANIFEST, PROGRESS)):
            if path.name == FETCHED:
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()
        with suppress(OSError):
            folder.rmdir()


def publish(folder: Path, out: Path) -> None:
    """Give a complete folder the name `out`, in place of a dataset that may be there."""
    refuse_foreign_files(out)
    discard(folder, kept=files_of(read_manifest(folder / MANIFEST)))
    replace_folder(folder, out)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second preparation out of a folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file_locked(out.with_name(f".{out.name}.lock")):
            yield
    except BlockingIOError:
        raise DataError(f"{out}: another preparation is writing there; wait for it or give another --out") from None
