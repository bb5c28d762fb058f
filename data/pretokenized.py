"""Token shards that somebody else made: fetch them, check every one, and write the manifest they lack."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.build import FETCHED, PROGRESS, aside, locked
from data.hub import HubFolder
from data.shards import (
    MANIFEST,
    SPLITS,
    DataError,
    ShardEntry,
    hash_file,
    read_shard_header,
    write_durably,
    write_manifest,
)
from data.tokenizer import GPT2Tokenizer

GPT2 = {"name": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size, "eot": GPT2Tokenizer.eot}


def examine(path: Path) -> ShardEntry:
    """Read a shard whole; DataError for a wrong header, a wrong length or a token that GPT-2 does not have."""
    shard = read_shard_header(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=shard.start) if shard.tokens else np.empty(0, "<u2")
    top, documents = -1, 0
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        top, documents = max(top, int(block.max())), documents + int(np.count_nonzero(block == GPT2["eot"]))
    if top >= GPT2["vocab_size"]:
        raise DataError(f"{path}: holds token {top}; GPT-2 has {GPT2['vocab_size']} ids: made with another tokenizer")
    return ShardEntry(path.name, shard.tokens, None, top, hash_file(path), documents)


def split_of(name: str) -> str:
    """ "val" for a shard whose name says so, else "train"."""
    return "val" if "val" in name else "train"


def index(folder: Path, source: dict) -> None:
    """Write the manifest of a folder of shards, which stay as they are. Raises DataError as `examine` does."""
    paths = sorted(folder.glob("*.bin"))
    splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for path in tqdm(paths, desc=f"checking {folder.name}", unit=" shards", disable=None):
        splits[split_of(path.name)].append(examine(path))
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
    index(folder, {"name": "pretokenized", "root": str(folder.resolve())})


def fetch(out: Path, wanted: dict) -> None:
    """Fetch shards from the hub into `out`: the validation shards, and the first wanted["shards"] of the others.

    wanted: also repo, pattern and asked_revision. What an interrupted call fetched is kept.
    Raises DataError for what the hub refuses and for bad shards.
    """
    folder = aside(out)
    folder.mkdir(parents=True, exist_ok=True)
    repo = wanted["repo"]
    with locked(folder):
        before = json.loads((folder / PROGRESS).read_text()) if (folder / PROGRESS).exists() else {}
        if before and {k: before.get(k) for k in wanted} != wanted:
            raise DataError(f"{folder} holds shards fetched with other settings; repeat them or give --fresh")
        hub = HubFolder(repo, wanted["pattern"], before.get("revision", wanted["asked_revision"]), folder / FETCHED)
        source = wanted | {"revision": hub.revision}
        write_durably(folder / PROGRESS, (json.dumps(source) + "\n").encode())
        train = [f for f in hub.files if split_of(f.name) == "train"][: wanted["shards"]]
        hub.files = [f for f in hub.files if f in train or split_of(f.name) == "val"]
        for file in tqdm(hub.files, desc=f"fetching {out.name}", unit=" shards", disable=None):
            path = folder / Path(file.name).name
            if path.exists() and path.stat().st_size == file.size:
                continue
            fetched = hub.fetch(file)
            if file.sha256 and hash_file(fetched) != file.sha256:
                fetched.unlink()
                raise DataError(f"{repo}: {file.name} came damaged (its sha256 is another); the same command continues")
            os.replace(fetched, path)
        index(folder, source)
        shutil.rmtree(folder / FETCHED, ignore_errors=True)
        (folder / PROGRESS).unlink()
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
