"""Which documents are for validation: three rules, each a function of names, numbers or tokens alone.

A rule names streams, each written to shards of its own, as (split of the first shard, split of the rest).
"""

import hashlib
import math
from typing import Protocol

import numpy as np


class Split(Protocol):
    """What the pipeline asks of a rule."""

    streams: tuple[tuple[str, str], ...]
    remedy: str  # when a split stays empty

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray: ...


class ByName:
    """A fixed share of documents, decided by the name of each."""

    streams = (("train", "train"), ("val", "val"))
    remedy = "give more text or another --val-fraction"

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        """Stream (count,) of documents with these names."""
        assert names is not None
        return np.array([int(in_validation(name, self.fraction)) for name in names], dtype=np.int64)


def in_validation(name: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < fraction * 2**32


class NanoGPT:
    """nanoGPT's validation documents: train_test_split(test_size=0.0005, seed=2357) of the `datasets` library.

    It puts the rows permutation(n)[:ceil(0.0005 n)] of NumPy's default generator aside. Here they stay in the
    order of the source, as the rest does; as a set they are the same, so losses over the whole of it compare.
    """

    streams = (("train", "train"), ("val", "val"))
    remedy = "give more documents"
    fraction, seed = 0.0005, 2357

    def __init__(self, documents: int) -> None:
        held_out = math.ceil(self.fraction * documents)
        self.val = np.sort(np.random.default_rng(self.seed).permutation(documents)[:held_out])

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        """Stream (count,) of the documents from number `first` on."""
        a, b = np.searchsorted(self.val, (first, first + count))
        out = np.zeros(count, dtype=np.int64)
        out[self.val[a:b] - first] = 1
        return out


class FirstShard:
    """The first shard is the validation set: the convention of the published FineWeb token shards."""

    streams = (("val", "train"),)
    remedy = "give more text or a smaller --shard-tokens"

    def streams_of(self, first: int, names: tuple[str, ...] | None, count: int) -> np.ndarray:
        """Stream (count,): there is one."""
        return np.zeros(count, dtype=np.int64)
