"""Check that a prepared folder is what its manifest says, and describe it."""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.shards import MANIFEST, SPLITS, DataError, Dataset, entries, open_dataset, required_manifest, shard_problems
from data.terms import recorded_terms


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
    """What a folder holds, one fact per line; budget: training tokens, to state the epochs that they make.

    Shards without a manifest are read whole, for their largest token and their share of zeros.
    """
    bare = folder.is_dir() and not (folder / MANIFEST).exists()
    manifest = {} if bare else required_manifest(folder)
    dataset = open_dataset(folder, 1 << 16 if bare else manifest["tokenizer"]["vocab_size"])
    hint = f"no {MANIFEST}; to write one: python -m data.prepare pretokenized --source {folder}"
    lines = [f"{folder}: {hint}" if bare else describe(folder)]
    facts = manifest.get("source", {}) | (recorded_terms(manifest) if manifest else {})
    lines += [f"  {key:15} {value}" for key, value in facts.items()]
    for split in SPLITS:
        facts = _facts_of_tokens(dataset, split) if bare else _facts_of_manifest(dataset, split)
        lines.append(f"  {split:15} {dataset.tokens(split):,} tokens, {facts}")
    if budget is not None:
        if not 0 < budget < math.inf:
            raise DataError(f"--budget {budget}: must be a number of tokens above 0")
        epochs = budget / dataset.tokens("train")
        lines.append(f"  {'epochs':15} {epochs:.2f} with {budget:,.0f} tokens of training")
    return "\n".join(lines)


def _facts_of_manifest(dataset: Dataset, split: str) -> str:
    listed = entries(dataset.manifest, split)
    counts = [e["documents"] for e in listed if e.get("documents") is not None]
    documents = f"{sum(counts):,}" if len(counts) == len(listed) else "unknown"
    density = dataset.bytes_per_token(split)
    return f"{documents} documents, {len(listed)} shards" + (f", {density:.3f} bytes/token" if density else "")


def _facts_of_tokens(dataset: Dataset, split: str) -> str:
    largest = zeros = 0
    for shard in tqdm(dataset.splits[split], desc=f"reading {split}", unit=" shards", disable=None):
        for tokens in shard.blocks():
            largest, zeros = max(largest, int(tokens.max())), zeros + int(np.count_nonzero(tokens == 0))
    share = zeros / max(1, dataset.tokens(split))
    return f"{len(dataset.splits[split])} shards, largest token {largest}, {share:.1%} of them 0"
