"""Token shards that others made: fetch them, check every one, and write the manifest that they lack."""

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.prepare.hub import download, hub_files
from data.prepare.output import FETCHED, begin, publish
from data.shards import MANIFEST, SPLITS, DataError, names_split, read_entry, read_shard_header, visible, write_manifest
from data.tokenizer import TOKENIZER_FILE, CustomTokenizer, GPT2Tokenizer, facts_of, get_tokenizer
from runtime.files import sha256_of, write_durably
from runtime.streams import printable

GPT2: dict[str, Any] = {"name": "gpt2", "vocab_size": GPT2Tokenizer.vocab_size, "eot": GPT2Tokenizer.eot}


def split_of(name: str) -> str:
    """The split that a shard's name says, "val" or "test", and otherwise "train"."""
    return next((split for split in ("val", "test") if names_split(name, split)), "train")


def index(folder: Path, paths: list[Path], source: dict, tokenizer: dict = GPT2) -> None:
    """Check a folder of shards and write its manifest. Raises DataError for a damaged shard or another tokenizer."""
    splits: dict = {split: [] for split in SPLITS}
    for path in tqdm(paths, desc=printable(f"checking {folder.name}"), unit=" shards", disable=None):
        entry = read_entry(read_shard_header(path), None if "file" in tokenizer else tokenizer["eot"])
        if entry.max_token >= tokenizer["vocab_size"]:
            ids = f"{tokenizer['name']} with {tokenizer['vocab_size']} ids"
            raise DataError(f"{path}: holds token {entry.max_token}, which {ids} lacks")
        splits[split_of(path.name)].append(entry)
    for split, entries in splits.items():
        if not entries:
            raise DataError(f"{folder}: no *{split}*.bin shards in it")
    write_manifest(folder, tokenizer, source, splits)


def index_in_place(folder: Path, tokenizer: str = "gpt2", separator: str | None = None) -> None:
    """Index a folder of the user's own shards, which stay where they are. A tokenizer file is copied there."""
    if not folder.is_dir():
        raise DataError(f"--source {folder}: no such folder")
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} has a {MANIFEST}; check it with: python -m data.prepare verify {folder}")
    facts, copy = GPT2, folder / TOKENIZER_FILE
    if (tokenizer, separator) != ("gpt2", None):
        chosen = get_tokenizer(tokenizer, eot=separator)
        facts = facts_of(chosen)
        if isinstance(chosen, CustomTokenizer) and not (copy.exists() and sha256_of(copy) == chosen.sha256):
            if copy.exists():
                raise DataError(f"{copy} is another tokenizer than {chosen.path}; move it away")
            write_durably(copy, chosen.path.read_bytes())
    paths = [p for p in visible(folder) if p.suffix == ".bin" and split_of(p.name) in SPLITS]
    index(folder, paths, {"name": "pretokenized", "root": str(folder.resolve())}, facts)


def fetch(out: Path, settings: dict, pinned: dict) -> None:
    """Fetch the validation shards and the first settings["shards"] training shards from the hub into `out`.

    settings: also repo, pattern and asked_revision; pinned: what an interrupted call recorded of its source.
    Raises DataError for errors of the hub and for damaged shards.
    """
    repo, pattern = settings["repo"], settings["pattern"]
    commit, found = hub_files(repo, pattern, pinned.get("revision", settings["asked_revision"]))
    train = [f for f in found if split_of(f.name) == "train"][: settings["shards"]]
    files = [f for f in found if f in train or split_of(f.name) == "val"]
    names = [Path(f.name).name for f in files]
    if len(set(names)) < len(names):
        raise DataError(f'{repo}: "{pattern}" matches files of one name in several folders; give a narrower --pattern')
    source = settings | {"revision": commit}
    folder = begin(out, {"source": source, "files": names})
    bar = tqdm(names, desc=printable(f"fetching {out.name}"), unit=" shards", disable=None)
    for name, file in zip(bar, files, strict=True):
        path = folder / name
        if path.exists() and path.stat().st_size == file.size:
            continue
        fetched = download(repo, commit, file.name, folder / FETCHED)
        if file.sha256 and sha256_of(fetched) != file.sha256:
            fetched.unlink()
            raise DataError(f"{repo}: {file.name} is damaged (its sha256 is wrong); the same command continues")
        os.replace(fetched, path)
    index(folder, [folder / name for name in names], source)
    publish(folder, out)
