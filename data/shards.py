"""The one format of token files, and the manifest that describes a folder of them.

A shard is a 1024-byte header of little-endian int32 (magic 20240520, version 1, token count, zeros)
and then uint16 tokens: the format of llm.c and modded-nanogpt. nanoGPT's headerless `train.bin` and
`val.bin` are read too. `manifest.json` names the tokenizer, the source and every shard with its token
count, largest token and sha256.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.files import write_durably, write_json

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One token file: where its tokens start (bytes) and how many there are."""

    path: Path
    start: int
    tokens: int

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill out (n,) uint16 with the tokens from offset on, by one positional read.

        Positional reads keep the resident memory at the size of the batch, where a memory map would
        count every page it ever touched.
        """
        wanted = out.nbytes
        got = os.preadv(_handle(self.path).fileno(), [out.data.cast("B")], self.start + 2 * offset)
        if got != wanted:
            raise DataError(f"{self.path}: ends {wanted - got} bytes early; it was truncated after it was opened")


@lru_cache(maxsize=256)  # bounds open files; an evicted one is closed when its last reader lets go
def _handle(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def read_shard_header(path: Path) -> Shard:
    """Check a shard's header and size. Raises DataError for a wrong magic, version or length."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            header = np.frombuffer(f.read(HEADER_BYTES), dtype="<i4", count=3 if size >= 12 else 0)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard") from None
    if size >= HEADER_BYTES and header[0] == MAGIC:
        if header[1] != VERSION:
            raise DataError(f"{path}: shard version {header[1]}, this program reads version {VERSION}")
        expected = HEADER_BYTES + 2 * int(header[2])
        if size != expected:
            raise DataError(
                f"{path}: {size} bytes where its header promises {expected}; "
                "the file is truncated or overwritten, prepare or fetch it again"
            )
        return Shard(path, HEADER_BYTES, int(header[2]))
    if path.name in ("train.bin", "val.bin") and size and size % 2 == 0:  # nanoGPT: nothing but tokens
        return Shard(path, 0, size // 2)
    found = int(header[0]) if len(header) else "nothing"
    raise DataError(f"{path}: not a token shard (magic {found}, expected {MAGIC})")


@dataclass(frozen=True)
class Dataset:
    """A checked folder of shards."""

    folder: Path
    splits: dict[str, list[Shard]]
    manifest: dict  # empty for a folder without one

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def fingerprint(self) -> str:
        """A name for exactly these tokens: hash of the shards' names, sizes and, from a manifest, contents."""
        listed = (
            {s: [(e["file"], e["tokens"], e.get("sha256")) for e in self.manifest["splits"].get(s, [])] for s in SPLITS}
            if self.manifest
            else None
        )
        found = listed or {s: [(x.path.name, x.tokens) for x in shards] for s, shards in self.splits.items()}
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text per token, to turn nats per token into bits per byte; None if unknown."""
        entries = self.manifest.get("splits", {}).get(split, [])
        if not entries or any(e.get("bytes") is None for e in entries):
            return None
        return sum(e["bytes"] for e in entries) / sum(e["tokens"] for e in entries)


def open_dataset(folder: str | Path, vocab_size: int) -> Dataset:
    """Open a folder of shards and check headers, sizes, manifest and token ids without reading it all.

    With a manifest the shards must be those it lists, and the largest token it states must fit
    vocab_size. Without one, every shard is probed in 16 places.
    Raises DataError, naming the file and the remedy.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"dataset folder {folder}: not found; prepare one, for example: python -m data.prepare pydocs")
    manifest: dict = {}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        splits = {s: [listed_shard(folder, e) for e in manifest["splits"].get(s, [])] for s in SPLITS}
        top = max((e["max_token"] for s in SPLITS for e in manifest["splits"].get(s, [])), default=-1)
        where = f"its tokenizer {manifest['tokenizer']['name']} has {manifest['tokenizer']['vocab_size']} ids"
    else:
        files = {s: [p for p in sorted(folder.glob("*.bin")) if names_split(p.name, s)] for s in SPLITS}
        if both := set(files["train"]) & set(files["val"]):
            raise DataError(f"{min(both)}: its name says both train and val; rename it")
        splits = {s: [read_shard_header(p) for p in paths] for s, paths in files.items()}
        top = max((_probe_largest_token(shard) for s in SPLITS for shard in splits[s]), default=-1)
        where = "seen when probing its shards"
    for split in SPLITS:
        if not splits[split]:
            raise DataError(f"dataset folder {folder}: no *{split}*.bin shards in it")
    if top >= vocab_size:
        raise DataError(
            f"dataset {folder}: token {top} ({where}) does not fit vocab_size={vocab_size}; "
            "set --vocab_size to the tokenizer's size or choose another dataset"
        )
    return Dataset(folder, splits, manifest)


def names_split(name: str, split: str) -> bool:
    """Whether a file name has "train" or "val" as a word of its own, so that "retrieval" is no validation data."""
    return re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()) is not None


def read_manifest(path: Path) -> dict:
    """A folder's manifest; DataError if it cannot be read or lacks what every reader needs."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise ValueError(f"format {manifest['format']!r}, this program reads 1")
        entries = [e for split in SPLITS for e in manifest["splits"].get(split, [])]
        for e in entries:
            numbers = [e["tokens"], e["max_token"], e.get("bytes") or 0]
            if Path(e["file"]).name != e["file"] or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"bad entry for {e['file']!r}")
        if len({e["file"] for e in entries}) < len(entries):
            raise ValueError("a file is listed twice")
        manifest["tokenizer"]["name"], manifest["tokenizer"]["vocab_size"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a dataset manifest ({type(error).__name__}: {error})") from None
    return manifest


def listed_shard(folder: Path, entry: dict) -> Shard:
    """The shard that an entry of the manifest names; DataError unless header, size and count agree with it."""
    shard = read_shard_header(folder / entry["file"])
    if shard.tokens != entry["tokens"]:
        raise DataError(
            f"{shard.path}: holds {shard.tokens} tokens where {MANIFEST} says {entry['tokens']}; "
            "the shard belongs to another preparation, prepare the dataset again"
        )
    return shard


def _probe_largest_token(shard: Shard, places: int = 16, length: int = 4096) -> int:
    buffer = np.empty(min(length, shard.tokens), dtype="<u2")
    largest = -1
    for offset in np.linspace(0, shard.tokens - len(buffer), places).astype(int) if len(buffer) else ():
        shard.read(int(offset), buffer)
        largest = max(largest, int(buffer.max()))
    return largest


@dataclass
class ShardEntry:
    """What the manifest says of a shard."""

    file: str
    tokens: int
    bytes: int | None  # UTF-8 bytes of the text these tokens stand for, without separators; None if unknown
    max_token: int
    sha256: str
    documents: int | None = None  # end-of-text tokens in it


def write_shard(path: Path, tokens: np.ndarray, text_bytes: int | None, eot: int | None = None) -> ShardEntry:
    """Write tokens (n,) as a shard: aside, flushed to the disk, then renamed into place."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    digest = write_durably(path, header, np.ascontiguousarray(tokens, dtype="<u2"))
    documents = int(np.count_nonzero(tokens == eot)) if eot is not None else None
    return ShardEntry(path.name, len(tokens), text_bytes, int(tokens.max(initial=0)), digest, documents)


def examine(shard: Shard, eot: int | None) -> ShardEntry:
    """Read a shard whole: its sha256, its largest token and its documents."""
    digest, top, documents = hashlib.sha256(), 0, 0
    with open(shard.path, "rb") as f:
        digest.update(f.read(shard.start))
        while block := f.read(1 << 22):
            digest.update(block)
            tokens = np.frombuffer(block, dtype="<u2")
            top, documents = max(top, int(tokens.max())), documents + int(np.count_nonzero(tokens == eot))
    known = documents if eot is not None else None
    return ShardEntry(shard.path.name, shard.tokens, None, top, digest.hexdigest(), known)


def write_manifest(folder: Path, tokenizer: dict, source: dict, splits: dict[str, Iterable[ShardEntry]]) -> None:
    """Write manifest.json; its presence says that the dataset is complete."""
    manifest = {
        "format": 1,
        "tokenizer": tokenizer,
        "source": source,
        "splits": {split: [asdict(e) for e in entries] for split, entries in splits.items()},
    }
    write_json(folder / MANIFEST, manifest)


def manifest_entries(folder: Path) -> list[dict]:
    """The manifest's entries, train first; DataError if there is no manifest to check against."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder}: no {MANIFEST} to check against; for shards of others: "
            f"python -m data.prepare pretokenized --source {folder}"
        )
    manifest = read_manifest(folder / MANIFEST)
    return [entry for split in SPLITS for entry in manifest["splits"].get(split, [])]


def shard_problems(folder: Path, hashes: bool = True, rank: int = 0, ranks: int = 1) -> list[str]:
    """Everything wrong with a folder, one line each: headers, sizes, counts, sha256, files that do not belong.

    Of several ranks each checks its share of the shards, and the first checks the folder.
    """
    listed = manifest_entries(folder)
    manifest = read_manifest(folder / MANIFEST)
    eot, vocab_size = manifest["tokenizer"].get("eot"), manifest["tokenizer"]["vocab_size"]

    def problem_of(entry: dict) -> str | None:
        try:
            shard = listed_shard(folder, entry)
        except DataError as error:
            return str(error)
        if hashes:
            found = examine(shard, eot)
            if found.sha256 != entry.get("sha256"):
                return (
                    f"{shard.path}: its sha256 is not the manifest's; the shard was changed, prepare or fetch it again"
                )
            for key, there in (("max_token", found.max_token), ("documents", found.documents)):
                if entry.get(key, there) not in (there, None):
                    return f"{shard.path}: {MANIFEST} says {key} {entry[key]}, it is {there}; {MANIFEST} was changed"
        if entry["max_token"] >= vocab_size:
            return f"{shard.path}: token {entry['max_token']} does not fit the tokenizer's {vocab_size} ids"
        return None

    with ThreadPoolExecutor(8) as pool:
        out = [problem for problem in pool.map(problem_of, listed[rank::ranks]) if problem]
    if rank > 0:
        return out
    counts = manifest.get("source", {}).get("read") or {"documents": 0, "unreadable": 0}
    read, held = counts["documents"] - counts["unreadable"], sum(entry.get("documents") or 0 for entry in listed)
    if read and read != held:
        out.append(f"{folder}: {read} documents were read, its shards hold {held}")
    names = {entry["file"] for entry in listed} | {MANIFEST}
    out += [f"{p}: not in the manifest" for p in sorted(folder.iterdir()) if p.name not in names]
    return out
