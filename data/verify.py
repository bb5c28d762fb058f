"""Prove that a prepared folder is what its manifest says, and say what is in it."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.shards import MANIFEST, SPLITS, DataError, examine, listed_shard, open_dataset, read_manifest


def entries(folder: Path) -> list[dict]:
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


def faults(folder: Path, hashes: bool = True, rank: int = 0, ranks: int = 1) -> list[str]:
    """Everything wrong with a folder, a line each: headers, sizes, counts, sha256, files that do not belong.

    Of several ranks each looks at its share of the shards, and the first at the folder.
    """
    listed = entries(folder)
    manifest = read_manifest(folder / MANIFEST)
    eot, vocab_size = manifest["tokenizer"].get("eot"), manifest["tokenizer"]["vocab_size"]

    def fault(entry: dict) -> str | None:
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
        out = [problem for problem in pool.map(fault, listed[rank::ranks]) if problem]
    if rank > 0:
        return out
    told = manifest.get("source", {}).get("read") or {"documents": 0, "unreadable": 0}
    read, held = told["documents"] - told["unreadable"], sum(entry.get("documents") or 0 for entry in listed)
    if read and read != held:
        out.append(f"{folder}: {read} documents were read, its shards hold {held}")
    names = {entry["file"] for entry in listed} | {MANIFEST}
    out += [f"{p}: not in the manifest" for p in sorted(folder.iterdir()) if p.name not in names]
    return out


def verify(folder: Path) -> str:
    """One line if all is well; DataError with a line for everything that is not."""
    found = faults(folder)
    if found:
        raise DataError("\n".join([f"{folder}: {len(found)} fault{'s' * (len(found) > 1)}", *found]))
    listed = entries(folder)
    return f"{folder}: {len(listed)} shards, {sum(e['tokens'] for e in listed):,} tokens: headers, counts, sha256 agree"


def describe(folder: Path) -> str:
    """One line on a prepared folder."""
    tokenizer = read_manifest(folder / MANIFEST)["tokenizer"]
    dataset = open_dataset(folder, tokenizer["vocab_size"])
    counts = ", ".join(f"{split} {dataset.tokens(split):,} tokens" for split in SPLITS)
    return f"{folder}: {counts}, tokenizer {tokenizer['name']} ({tokenizer['vocab_size']} ids)"


def info(folder: Path, budget: float | None) -> str:
    """What a folder holds, a line a fact; budget: training tokens, to state the epochs they make."""
    entries(folder)
    manifest = read_manifest(folder / MANIFEST)
    dataset = open_dataset(folder, manifest["tokenizer"]["vocab_size"])
    lines = [describe(folder)]
    lines += [f"  {key:15} {value}" for key, value in manifest.get("source", {}).items()]
    for split in SPLITS:
        part = manifest["splits"][split]
        counts = [e.get("documents") for e in part]
        documents = "unknown" if None in counts else f"{sum(counts):,}"
        density = dataset.bytes_per_token(split)
        text = f"  {split:15} {dataset.tokens(split):,} tokens, {documents} documents, {len(part)} shards"
        lines.append(text + (f", {density:.3f} bytes/token" if density else ""))
    if budget is not None:
        if not 0 < budget < math.inf:
            raise DataError(f"--budget {budget}: must be a number of tokens above 0")
        epochs = budget / dataset.tokens("train")
        lines.append(f"  {'epochs':15} {epochs:.2f} with {budget:,.0f} tokens of training")
    return "\n".join(lines)
