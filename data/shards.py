"""The file format of token shards, and the manifest that describes a folder of them.

A shard is a header of 1024 bytes, little-endian int32 (magic 20240520, version 1, token count, zeros), followed by
uint16 tokens. llm.c and modded-nanogpt use this format. nanoGPT's `train.bin` and `val.bin`, which have no header, can
be read too. `manifest.json` names the tokenizer, the source with licence and citation, and each shard with its token
count, largest token and sha256.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.reading import FILES, WAITS, DataError, read_at
from data.terms import terms_of
from data.tokenizer import facts_by_size
from data.unlabelled import other_content
from runtime.errors import UserError
from runtime.files import sha256_of, write_durably, write_json

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
BLOCK = 1 << 21  # tokens read at a time when a whole shard is read


@dataclass(frozen=True)
class Shard:
    """A token file: its tokens start at byte `start`."""

    path: Path
    start: int
    tokens: int

    def read(self, offset: int, out: np.ndarray, waits: Sequence[float] = WAITS) -> None:
        """Fill out (n,) uint16 with the tokens from offset on. Raises DataError if that is impossible.

        waits: as in `read_at`.
        """
        got = read_at(self.path, self.start + 2 * offset, out.data.cast("B"), waits)
        if got < out.nbytes:
            raise DataError(f"{self.path}: ends {out.nbytes - got} bytes early; it was truncated after it was opened")

    def samples(self, places: int = 16, length: int = 4096) -> np.ndarray:
        """Tokens (places, at most length) uint16 from evenly spaced places, which start at multiples of 4."""
        out = np.empty((places, min(length, self.tokens)), dtype="<u2")
        if out.size:
            for row, offset in zip(out, np.linspace(0, self.tokens - out.shape[1], places), strict=True):
                self.read(int(offset) // 4 * 4, row)
        return out

    def blocks(self, waits: Sequence[float] = WAITS) -> Iterator[np.ndarray]:
        """All tokens, in arrays of at most BLOCK tokens. Each array is overwritten by the next one."""
        block = np.empty(min(BLOCK, self.tokens), dtype="<u2")
        for start in range(0, self.tokens, BLOCK):
            tokens = block[: self.tokens - start]
            self.read(start, tokens, waits)
            yield tokens


def read_shard_header(path: Path) -> Shard:
    """Check a shard's header and size. Raises DataError for a wrong magic, version or length."""
    if not path.is_file():
        raise DataError(f"{path}: no such shard")
    size = path.stat().st_size
    FILES.drop(path)  # another file may have had this name
    start = bytearray(min(size, HEADER_BYTES))
    read_at(path, 0, memoryview(start))
    header = np.frombuffer(start, dtype="<i4", count=3 if size >= 12 else 0)
    if size >= HEADER_BYTES and header[0] == MAGIC:
        if header[1] != VERSION:
            raise DataError(f"{path}: shard version {header[1]}, this program reads version {VERSION}")
        expected = HEADER_BYTES + 2 * int(header[2])
        if size != expected:
            problem = f"{path}: {size} bytes, but its header says {expected}"
            raise DataError(f"{problem}; the file is truncated or overwritten, prepare or fetch it again")
        return Shard(path, HEADER_BYTES, int(header[2]))
    shard = Shard(path, 0, size // 2)
    if content := other_content(bytes(start), shard.samples()):
        raise DataError(f"{path}: {content}")
    if path.name in ("train.bin", "val.bin") and size and size % 2 == 0:  # nanoGPT: tokens without a header
        return shard
    found = int(header[0]) if len(header) else "nothing"
    hint = "nanoGPT's files have the names train.bin and val.bin and an even size; python -m data.prepare reads text"
    raise DataError(f"{path}: not a token shard (it starts with {found}, a shard with {MAGIC}); {hint}")


@dataclass(frozen=True)
class Dataset:
    """A checked folder of shards."""

    folder: Path
    splits: dict[str, list[Shard]]
    manifest: dict  # empty for a folder without one
    tokenizer: dict | None  # its facts: from the manifest, else from the size of the model's vocabulary

    def tokens(self, split: str) -> int:
        """Number of tokens in a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def fingerprint(self) -> str:
        """A hash that identifies the tokens: of names, sizes and, with a manifest, contents of the shards."""
        content: dict = {split: [(x.path.name, x.tokens) for x in self.splits[split]] for split in self.splits}
        for split in SPLITS if self.manifest else ():
            content[split] = [(e["file"], e["tokens"], e.get("sha256")) for e in entries(self.manifest, split)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def changed_shard(self, split: str) -> str | None:
        """A message about the first shard of a split whose sha256 is not the manifest's; None if all agree."""
        for entry in entries(self.manifest, split) if self.manifest else ():
            path = self.folder / entry["file"]
            if entry.get("sha256") and sha256_of(path) != entry["sha256"]:
                return f"{path}: its sha256 is not the manifest's; the shard was changed, prepare or fetch it again"
        return None

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text per token, to turn nats per token into bits per byte; None if unknown."""
        listed = entries(self.manifest, split) if self.manifest else []
        if not listed or any(e.get("bytes") is None for e in listed):
            return None
        return sum(e["bytes"] for e in listed) / sum(e["tokens"] for e in listed)


def open_dataset(folder: str | Path, vocab_size: int) -> Dataset:
    """Open a folder of shards. Check headers, sizes, manifest and token ids without reading everything.

    With a manifest, the shards must be those it lists, and their largest token must be below vocab_size. Without one,
    16 places of every shard are checked for larger tokens.
    Raises DataError, which names the file and says what to do.
    """
    folder = Path(folder)
    if folder.is_file():
        raise DataError(f"data.path {folder}: is a file; give the folder of the shards, {folder.parent}")
    if not folder.is_dir():
        raise DataError(missing_dataset(folder))
    manifest: dict = {}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        splits = {s: [listed_shard(folder, e) for e in entries(manifest, s)] for s in SPLITS}
        largest = max((e["max_token"] for e in entries(manifest)), default=-1)
        tokenizer = manifest["tokenizer"]
        where = f"its tokenizer {tokenizer['name']} has {tokenizer['vocab_size']} ids"
        if "file" in tokenizer:
            largest = max(largest, tokenizer["vocab_size"] - 1)
            if not (folder / tokenizer["file"]).is_file():
                raise DataError(f"{folder / tokenizer['file']}: missing, the dataset's tokenizer; copy it there again")
    else:
        paths = [p for p in visible(folder) if p.suffix == ".bin"]
        files = {s: [p for p in paths if names_split(p.name, s)] for s in SPLITS}
        if both := set(files["train"]) & set(files["val"]):
            raise DataError(f"{min(both)}: its name says both train and val; rename it")
        splits = {s: [read_shard_header(p) for p in found] for s, found in files.items()}
        largest = max((int(shard.samples().max(initial=0)) for s in SPLITS for shard in splits[s]), default=-1)
        where = "found when checking parts of its shards"
    for split in SPLITS:
        if not splits[split]:
            raise DataError(f"dataset folder {folder}: no *{split}*.bin shards in it")
    if largest >= vocab_size:
        raise DataError(
            f"dataset {folder}: token {largest} ({where}) does not fit vocab_size={vocab_size}; "
            "set --vocab_size to the tokenizer's size or choose another dataset"
        )
    return Dataset(folder, splits, manifest, manifest.get("tokenizer") or facts_by_size(vocab_size))


def missing_dataset(folder: Path) -> str:
    """The message for a dataset that does not exist, with the command that makes it."""
    command = "openwebtext" if folder.name == "openwebtext" else "pydocs"
    if re.fullmatch(r"fineweb(_edu)?_\d+B", folder.name):
        command = f"pretokenized {folder.name}"
    return f"dataset folder {folder}: not found; prepare one, for example: python -m data.prepare {command}"


def visible(folder: Path) -> list[Path]:
    """The entries of a folder in order, without names that begin with a dot: these are files of the system."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def names_split(name: str, split: str) -> bool:
    """Whether "train" or "val" is a word in a file name; "retrieval" does not contain the word "val"."""
    return re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()) is not None


def read_manifest(path: Path) -> dict:
    """A folder's manifest; DataError if it cannot be read or lacks what every reader needs."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise UserError(f"format {manifest['format']!r}, this program reads 1")
        listed = entries(manifest)
        for e in listed:
            known = (e[key] for key in ("bytes", "documents") if e.get(key) is not None)
            numbers = [e["tokens"], e["max_token"], *known]
            if Path(e["file"]).name != e["file"] or any(type(n) is not int or n < 0 for n in numbers):
                raise UserError(f"bad entry for {e['file']!r}")
        if len({e["file"] for e in listed}) < len(listed):
            raise UserError("a file is listed twice")
        tokenizer, source = manifest["tokenizer"], manifest.get("source", {})
        kinds = {"name": (str,), "vocab_size": (int,), "eot": (int, type(None)), "file": (str, type(None))}
        if wrong := [key for key, allowed in kinds.items() if type(tokenizer.get(key)) not in allowed]:
            raise UserError(f"bad entry for the tokenizer's {wrong[0]}")
        if "file" in tokenizer and Path(tokenizer["file"]).name != tokenizer["file"]:
            raise UserError(f"bad entry for {tokenizer['file']!r}")
        if any(type(text) is not str for text in manifest.get("terms", {}).values()):
            raise UserError(f"bad entry for the terms, {manifest['terms']!r}")
        counts = source.get("read") or {"documents": 0, "unreadable": 0}
        if type(counts["documents"] - counts["unreadable"]) is not int:
            raise UserError(f"bad entry for {counts!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset manifest ({type(error).__name__}: {error})") from None
    return manifest


def entries(manifest: dict, *splits: str) -> list[dict]:
    """The entries of a manifest: those of the given splits, or all of them, train first."""
    return [entry for split in splits or SPLITS for entry in manifest["splits"].get(split, [])]


def files_of(manifest: dict) -> set[str]:
    """The names of the files of a dataset."""
    return {MANIFEST, manifest["tokenizer"].get("file", MANIFEST), *(entry["file"] for entry in entries(manifest))}


def listed_shard(folder: Path, entry: dict) -> Shard:
    """The shard of a manifest's entry; DataError unless header, size and token count agree with the entry."""
    shard = read_shard_header(folder / entry["file"])
    if shard.tokens != entry["tokens"]:
        problem = f"{shard.path}: holds {shard.tokens} tokens, but {MANIFEST} says {entry['tokens']}"
        raise DataError(f"{problem}; the shard belongs to another preparation, prepare the dataset again")
    return shard


@dataclass
class ShardEntry:
    """A shard as the manifest describes it."""

    file: str
    tokens: int
    bytes: int | None  # UTF-8 bytes of the text of these tokens, without separators; None if unknown
    max_token: int
    sha256: str
    documents: int | None = None  # number of end-of-text tokens


def write_shard(path: Path, tokens: np.ndarray, text_bytes: int | None, eot: int | None = None) -> ShardEntry:
    """Write tokens (n,) as a shard, which appears under its name when it is complete and on the disk."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    digest = write_durably(path, header, np.ascontiguousarray(tokens, dtype="<u2"))
    documents = int(np.count_nonzero(tokens == eot)) if eot is not None else None
    return ShardEntry(path.name, len(tokens), text_bytes, int(tokens.max(initial=0)), digest, documents)


def read_entry(shard: Shard, eot: int | None, waits: Sequence[float] = WAITS) -> ShardEntry:
    """Read a whole shard: its sha256, its largest token and its number of documents."""
    header, largest, documents = bytearray(shard.start), 0, 0
    read_at(shard.path, 0, memoryview(header), waits)
    digest = hashlib.sha256(header)
    for tokens in shard.blocks(waits):
        digest.update(tokens.data)
        largest, documents = max(largest, int(tokens.max())), documents + int(np.count_nonzero(tokens == eot))
    known = documents if eot is not None else None
    return ShardEntry(shard.path.name, shard.tokens, None, largest, digest.hexdigest(), known)


def write_manifest(folder: Path, tokenizer: dict, source: dict, splits: Mapping[str, Iterable[ShardEntry]]) -> None:
    """Write manifest.json, with the terms that follow from the source. A dataset with a manifest is complete."""
    listed = {split: [asdict(e) for e in shards] for split, shards in splits.items()}
    facts = {"format": 1, "tokenizer": tokenizer, "source": source, "terms": terms_of(source)}
    write_json(folder / MANIFEST, facts | {"splits": listed})


def required_manifest(folder: Path) -> dict:
    """The manifest of a folder that must have one. Raises DataError if it has none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not (folder / MANIFEST).exists():
        hint = f"for shards that others made: python -m data.prepare pretokenized --source {folder}"
        raise DataError(f"{folder}: no {MANIFEST} to check against; {hint}")
    return read_manifest(folder / MANIFEST)


def shard_problems(folder: Path, hashes: bool = True, rank: int = 0, ranks: int = 1) -> list[str]:
    """Every problem of a folder, one line each: headers, sizes, counts, sha256, files that do not belong.

    Each of several ranks checks a part of the shards, and rank 0 checks the folder.
    """
    manifest = required_manifest(folder)
    listed, eot, vocab_size = entries(manifest), manifest["tokenizer"].get("eot"), manifest["tokenizer"]["vocab_size"]

    def problem_of(entry: dict) -> str | None:
        try:
            shard = listed_shard(folder, entry)
        except DataError as error:
            return str(error)
        found = asdict(read_entry(shard, eot)) if hashes else entry
        if found["sha256"] != entry["sha256"]:
            return f"{shard.path}: its sha256 is not the manifest's; the shard was changed, prepare or fetch it again"
        for key in ("max_token", "documents"):
            if found[key] is not None and entry.get(key, found[key]) not in (found[key], None):
                return f"{shard.path}: {MANIFEST} says {key} {entry[key]}, it is {found[key]}; {MANIFEST} was changed"
        if entry["max_token"] >= vocab_size:
            return f"{shard.path}: token {entry['max_token']} does not fit the tokenizer's {vocab_size} ids"
        return None

    with ThreadPoolExecutor(8) as pool:
        problems = [problem for problem in pool.map(problem_of, listed[rank::ranks]) if problem]
    if rank > 0:
        return problems
    counts = manifest.get("source", {}).get("read") or {"documents": 0, "unreadable": 0}
    read = counts["documents"] - counts["unreadable"]
    known = [entry["documents"] for entry in listed if entry.get("documents") is not None]
    if read and len(known) == len(listed) and read != (found := sum(known)):
        problems.append(f"{folder}: {read} documents were read, its shards hold {found}")
    file, names = manifest["tokenizer"].get("file"), files_of(manifest)
    if file and not ((folder / file).is_file() and sha256_of(folder / file) == manifest["tokenizer"]["sha256"]):
        problems.append(f"{folder / file}: missing or changed, the dataset's tokenizer; copy it there again")
    return problems + [f"{p}: not in the manifest" for p in visible(folder) if p.name not in names]
