"""Token shards that somebody else made: fetch them, check every one, and write the manifest they lack."""

import json
import os
from pathlib import Path

from tqdm import tqdm

from data.prepare.hub import HubFolder
from data.prepare.place import FETCHED, PROGRESS, aside, locked, settle
from data.shards import (
    MANIFEST,
    SPLITS,
    DataError,
    ShardEntry,
    examine,
    names_split,
    read_shard_header,
    write_manifest,
)
from data.tokenizer import GPT2Tokenizer
from runtime.files import sha256_of, write_durably

GPT2 = {"name": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size, "eot": GPT2Tokenizer.eot}


def entry(path: Path) -> ShardEntry:
    """Read a shard whole; DataError for a wrong header, a wrong length or a token that GPT-2 does not have."""
    found = examine(read_shard_header(path), GPT2["eot"])
    if found.max_token >= GPT2["vocab_size"]:
        raise DataError(
            f"{path}: holds token {found.max_token}; GPT-2 has {GPT2['vocab_size']} ids: made with another tokenizer"
        )
    return found


def split_of(name: str) -> str:
    """ "val" for a shard whose name says so, else "train"."""
    return "val" if names_split(name, "val") else "train"


def index(folder: Path, paths: list[Path], source: dict) -> None:
    """Write the manifest of a folder of shards, which stay as they are. Raises DataError as `entry` does."""
    splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for path in tqdm(paths, desc=f"checking {folder.name}", unit=" shards", disable=None):
        splits[split_of(path.name)].append(entry(path))
    for split, entries in splits.items():
        if not entries:
            raise DataError(f"{folder}: no *{split}*.bin shards in it")
    write_manifest(folder, GPT2, source, splits)


def index_in_place(folder: Path) -> None:
    """Index a folder that the user has; DataError if it has a manifest already."""
    if not folder.is_dir():
        raise DataError(f"--source {folder}: no such folder")
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} has a {MANIFEST}; check it with: python -m data.prepare verify {folder}")
    index(folder, sorted(folder.glob("*.bin")), {"name": "pretokenized", "root": str(folder.resolve())})


def fetch(out: Path, wanted: dict, before: dict) -> None:
    """Fetch shards from the hub into `out`: the validation shards, and the first wanted["shards"] of the others.

    wanted: also repo, pattern and asked_revision; before: what an interrupted call wrote down, whose files are kept.
    Raises DataError for what the hub refuses and for bad shards.
    """
    folder, repo = aside(out), wanted["repo"]
    hub = HubFolder(repo, wanted["pattern"], before.get("revision", wanted["asked_revision"]))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        train = [f for f in hub.files if split_of(f.name) == "train"][: wanted["shards"]]
        hub.files = [f for f in hub.files if f in train or split_of(f.name) == "val"]
        paths = [folder / Path(f.name).name for f in hub.files]
        if len(set(paths)) < len(paths):
            raise DataError(f'{repo}: "{wanted["pattern"]}" matches files of one name in several folders; narrow it')
        state = {"source": wanted | {"revision": hub.revision}, "files": [p.name for p in paths]}
        write_durably(folder / PROGRESS, (json.dumps(state) + "\n").encode())
        bar = tqdm(paths, desc=f"fetching {out.name}", unit=" shards", disable=None)
        for path, file in zip(bar, hub.files, strict=True):
            if path.exists() and path.stat().st_size == file.size:
                continue
            fetched = hub.download(file, folder / FETCHED)
            if file.sha256 and sha256_of(fetched) != file.sha256:
                fetched.unlink()
                raise DataError(f"{repo}: {file.name} came damaged (its sha256 is another); the same command continues")
            os.replace(fetched, path)
        index(folder, paths, state["source"])
        settle(folder, out)
