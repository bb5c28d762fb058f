"""Prove that a prepared folder is what its manifest says, and say what is in it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.shards import MANIFEST, SPLITS, DataError, hash_file, listed_shard, open_dataset, read_manifest


def entries(folder: Path) -> list[dict]:
    """The manifest's entries, train first; DataError if there is no manifest to check against."""
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder}: no {MANIFEST} to check against; for shards of others: "
            f"python -m data.prepare pretokenized --source {folder}"
        )
    manifest = read_manifest(folder / MANIFEST)
    return [entry for split in SPLITS for entry in manifest["splits"].get(split, [])]


def faults(folder: Path, hashes: bool = True) -> list[str]:
    """Everything wrong with a folder, a line each: headers, sizes, counts, sha256, files that do not belong."""
    listed = entries(folder)

    def fault(entry: dict) -> str | None:
        try:
            shard = listed_shard(folder, entry)
        except DataError as error:
            return str(error)
        if hashes and hash_file(shard.path) != entry.get("sha256"):
            return f"{shard.path}: its sha256 is not the manifest's; the shard was changed, prepare or fetch it again"
        return None

    with ThreadPoolExecutor(8) as pool:
        out = [problem for problem in pool.map(fault, listed) if problem]
    names = {entry["file"] for entry in listed} | {MANIFEST}
    out += [f"{p}: not in the manifest" for p in sorted(folder.iterdir()) if p.name not in names]
    return out


def verify(folder: Path) -> str:
    """One line if all is well; DataError with a line for everything that is not."""
    found = faults(folder)
    if found:
        raise DataError("\n".join([f"{folder}: {len(found)} faults", *found]))
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
    if budget:
        epochs = budget / dataset.tokens("train")
        lines.append(f"  {'epochs':15} {epochs:.2f} with {budget:,.0f} tokens of training")
    return "\n".join(lines)
