"""Which documents are for validation: three rules, each of which depends on names, numbers or tokens alone.

A rule assigns each document to a stream. A stream is a sequence of shards; `streams` gives, for each stream, the split
of its first shard and the split of the others.
"""

import hashlib
import math
from typing import ClassVar, Protocol

import numpy as np


class Split(Protocol):
    """What the pipeline needs of a rule."""

    @property
    def streams(self) -> tuple[tuple[str, str], ...]: ...

    hint: str  # what to change if a split stays empty

    # stream numbers (count,) of the documents from number `first` on
    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray: ...


class ByName:
    """A fixed fraction of documents, chosen by a hash of their names."""

    streams = (("train", "train"), ("val", "val"))
    hint = "give more text or another --val_fraction"

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        assert names is not None
        # a file name that is not UTF-8 holds its bytes as surrogates
        hashes = [int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8], 16) for name in names]
        return (np.array(hashes) < self.fraction * 2**32).astype(np.int64)


class NanoGPT:
    """nanoGPT's validation documents: train_test_split(test_size=0.0005, seed=2357) of the `datasets` library.

    They are the rows permutation(n)[:ceil(0.0005 n)] of NumPy's default generator. Here they keep the order of the
    source. The set is the same, so losses over the whole of it can be compared.
    """

    streams = (("train", "train"), ("val", "val"))
    hint = "give more documents"
    fraction, seed = 0.0005, 2357
    settings: ClassVar[dict] = {"split": "nanogpt", "val_fraction": fraction, "val_seed": seed}

    def __init__(self, documents: int) -> None:
        count = math.ceil(self.fraction * documents)
        self.val = np.sort(np.random.default_rng(self.seed).permutation(documents)[:count])

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        a, b = np.searchsorted(self.val, (first, first + count))
        streams = np.zeros(count, dtype=np.int64)
        streams[self.val[a:b] - first] = 1
        return streams


class FirstShard:
    """The first shard is the validation set: the convention of the published FineWeb token shards."""

    streams = (("val", "train"),)
    hint = "give more text or a smaller --shard_tokens"
    settings: ClassVar[dict] = {"split": "first shard"}

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)
