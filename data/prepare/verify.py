"""Check that a prepared folder is what its manifest says, and describe it."""

import math
from pathlib import Path

from data.shards import SPLITS, DataError, entries, open_dataset, required_manifest, shard_problems


def verify(folder: Path) -> str:
    """One line if all is well; DataError with a line for each problem."""
    problems = shard_problems(folder)
    if problems:
        raise DataError("\n".join([f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))
    listed = entries(required_manifest(folder))
    tokens = sum(e["tokens"] for e in listed)
    return f"{folder}: {len(listed)} shards, {tokens:,} tokens: headers, counts, sha256 agree"


def describe(folder: Path) -> str:
    """One line about a prepared folder."""
    tokenizer = required_manifest(folder)["tokenizer"]
    dataset = open_dataset(folder, tokenizer["vocab_size"])
    counts = ", ".join(f"{split} {dataset.tokens(split):,} tokens" for split in SPLITS)
    return f"{folder}: {counts}, tokenizer {tokenizer['name']} ({tokenizer['vocab_size']} ids)"


def info(folder: Path, budget: float | None) -> str:
    """What a folder holds, one fact per line; budget: training tokens, to state the epochs that they make."""
    manifest = required_manifest(folder)
    dataset = open_dataset(folder, manifest["tokenizer"]["vocab_size"])
    lines = [describe(folder)]
    lines += [f"  {key:15} {value}" for key, value in manifest.get("source", {}).items()]
    for split in SPLITS:
        listed = entries(manifest, split)
        counts = [e["documents"] for e in listed if e.get("documents") is not None]
        documents = f"{sum(counts):,}" if len(counts) == len(listed) else "unknown"
        density = dataset.bytes_per_token(split)
        line = f"  {split:15} {dataset.tokens(split):,} tokens, {documents} documents, {len(listed)} shards"
        lines.append(line + (f", {density:.3f} bytes/token" if density else ""))
    if budget is not None:
        if not 0 < budget < math.inf:
            raise DataError(f"--budget {budget}: must be a number of tokens above 0")
        epochs = budget / dataset.tokens("train")
        lines.append(f"  {'epochs':15} {epochs:.2f} with {budget:,.0f} tokens of training")
    return "\n".join(lines)
