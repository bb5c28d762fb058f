"""Batches as a pure function of (seed, step).

A split is cut into windows of block_size tokens, plus the target of the last one. Sequence number
s = step * batch_size + j of a run lies in epoch s // N, if there are N windows, and is window
permutation(seed, epoch)[s % N]. The permutation is computed one index at a time and never stored. So a run can continue
at any step, on any number of processes, from the step number alone, and evaluation does not change the order.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.shards import DataError, Dataset, Shard
from optimizers.options import errors_of, option


@dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, in which order, and which HellaSwag items are scored during training."""

    # may change on resume, because a run identifies its data by content
    path: str = option("data/tokens/pydocs", "dataset folder, from data.prepare or nanoGPT's", on_resume="free")
    sampling: Literal["permutation", "replacement"] = option(
        "permutation", "permutation reads every window once per epoch; replacement draws at random (as published)"
    )
    val_windows: int = option(4096, "windows of the validation set to use, at most", least=1, on_resume="free")
    val_sampling: Literal["fixed", "random"] = option(
        "fixed", "validation windows: fixed, or random ones for every evaluation (as published)", on_resume="free"
    )
    hellaswag: str = option("", "file of HellaSwag rows to score during training; empty: none", on_resume="free")
    hellaswag_every: int = option(5, "evaluations from one HellaSwag score to the next", least=1, on_resume="free")
    hellaswag_items: int = option(256, "HellaSwag items to score, at most", least=1, on_resume="free")

    def errors(self) -> list[str]:
        """Every error of this config, one line each."""
        return errors_of(self)


def mix64(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers, one to one: the finalizer of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash integers (broadcast against each other) to uint64."""
    out = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        out = mix64(out + np.asarray(number, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return out


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map each index by a pseudo-random permutation of range(n), which seed and epoch determine.

    A Feistel network of six rounds permutes the numbers of the next even bit width. It is applied again to results
    of n or more, until they are below n (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = hashed(seed, epoch, np.arange(6))
    out = np.asarray(index, dtype=np.uint64).copy()
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        out[todo] = (left << half) | right
        todo &= out >= n
    return out.astype(np.int64)


class Windows:
    """The windows of a split. They start `stride` tokens apart and never cross the end of a shard."""

    def __init__(self, shards: list[Shard], block_size: int, stride: int) -> None:
        self.shards, self.block_size, self.stride = shards, block_size, stride
        counts = [max(0, (s.tokens - 1 - block_size) // stride + 1) for s in shards]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, window: int) -> tuple[Shard, int]:
        """The shard of a window, and the token offset in it at which the window starts."""
        i = int(np.searchsorted(self.ends, window, side="right"))
        first = int(self.ends[i - 1]) if i else 0
        return self.shards[i], (int(window) - first) * self.stride

    def read(self, windows: np.ndarray, vocab_size: int) -> np.ndarray:
        """Tokens (len(windows), block_size + 1) uint16. Raises DataError for a token >= vocab_size."""
        out = np.empty((len(windows), self.block_size + 1), dtype="<u2")
        for row, window in zip(out, windows, strict=True):
            shard, offset = self.locate(window)
            shard.read(offset, row)
        if out.size and out.max() >= vocab_size:
            row, column = np.argwhere(out >= vocab_size)[0]
            shard, offset = self.locate(windows[row])
            problem = f"{shard.path}: token {out[row, column]} at offset {offset + column}"
            advice = f"python -m data.prepare verify {shard.path.parent}"
            damage = "the shard is damaged, or the setting is not that of its tokenizer"
            raise DataError(f"{problem} does not fit vocab_size={vocab_size}; {damage}: {advice}")
        return out


class TrainLoader:
    """The training batches of one rank.

    Raises DataError if the split is shorter than one window or holds a token that does not fit vocab_size.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        block_size: int,
        batch_size: int,
        vocab_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % world_size == 0
        self.batch_size, self.vocab_size, self.seed = batch_size, vocab_size, seed
        self.replacement = config.sampling == "replacement"
        self.windows = Windows(dataset.splits["train"], block_size, 1 if self.replacement else block_size)
        _require_windows(self.windows, dataset, "train")
        self.origin = (0, 0)
        rows = batch_size // world_size
        self.rows = slice(rank * rows, (rank + 1) * rows)  # this rank's rows of the global batch

    def start_at(self, step: int, sequences: int) -> None:
        """Start `step` after the first `sequences` sequences, because earlier steps had another batch size."""
        self.origin = (step, sequences)

    def window_ids(self, step: int) -> np.ndarray:
        """Window numbers (batch_size,) of a step's global batch, the same on every rank."""
        first_step, before = self.origin
        sequence = before + (step - first_step) * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        n = len(self.windows)
        if self.replacement:
            return (hashed(self.seed, sequence) % np.uint64(n)).astype(np.int64)
        epochs = sequence // n
        parts = [permute(sequence[epochs == e] % n, n, self.seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(parts)

    def epochs(self, sequences: int) -> float:
        """The epochs that this number of sequences makes; tokens are counted if windows overlap."""
        return sequences * self.windows.block_size / (len(self.windows) * self.windows.stride)

    def batch(self, step: int) -> np.ndarray:
        """This rank's slice of a step's batch: tokens (batch_size / world_size, block_size + 1) uint16."""
        return self.windows.read(self.window_ids(step)[self.rows], self.vocab_size)

    def bad_samples(self, step: int, loss_of: Callable[[Tensor], Tensor]) -> list[str]:
        """This rank's sequences of a step with a loss that is not finite, as "shard@token offset".

        loss_of: computes the loss of one row of tokens (block_size + 1) uint16.
        """
        bad = []
        for row, window in zip(self.batch(step), self.window_ids(step)[self.rows], strict=True):
            if not torch.isfinite(loss_of(torch.from_numpy(row))):
                shard, offset = self.windows.locate(window)
                bad.append(f"{shard.path.name}@{offset}")
        return bad


class ValidationSet:
    """A fixed set of windows, spread evenly over the split, in batches that do not depend on the number of ranks.

    Batch b belongs to rank b % world_size. With val_sampling="random", (seed, step) determine other windows for every
    evaluation, as in the official code of the MARS papers.
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, *, block_size: int, micro_batch: int, vocab_size: int, seed: int
    ) -> None:
        self.random = config.val_sampling == "random"
        self.windows = Windows(dataset.splits["val"], block_size, 1 if self.random else block_size)
        _require_windows(self.windows, dataset, "val")
        self.count = min(config.val_windows, len(self.windows))
        self.micro_batch, self.vocab_size, self.seed = micro_batch, vocab_size, seed

    def __len__(self) -> int:
        return math.ceil(self.count / self.micro_batch)

    def batch(self, number: int, step: int) -> np.ndarray:
        """Tokens (at most micro_batch, block_size + 1) uint16 of one batch of the evaluation after `step`."""
        index = np.arange(number * self.micro_batch, min(self.count, (number + 1) * self.micro_batch), dtype=np.int64)
        if self.random:
            ids = (hashed(self.seed, 1, step, index) % np.uint64(len(self.windows))).astype(np.int64)
        else:
            ids = self._spread(index)
        return self.windows.read(ids, self.vocab_size)

    def _spread(self, index: np.ndarray) -> np.ndarray:
        return index * len(self.windows) // self.count

    def fingerprint(self) -> str:
        """A hash of the tokens of the windows; with val_sampling="random", of evenly spaced windows."""
        digest = hashlib.sha256()
        for index in range(self.count):
            digest.update(self.windows.read(self._spread(np.array([index])), self.vocab_size).tobytes())
        return digest.hexdigest()[:16]

    def inputs(self, number: int, step: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Inputs and targets (micro_batch, block_size) of one batch on a device, and its number of windows.

        The last batch is filled up, so that a compiled model sees one shape. The loss ignores the targets -1 of these
        extra rows.
        """
        tokens = torch.from_numpy(self.batch(number, step))
        full = torch.zeros(self.micro_batch, tokens.size(1), dtype=tokens.dtype)
        full[: tokens.size(0)] = tokens
        idx, targets = to_device(full, device)
        targets = targets.clone()  # idx uses the same memory
        targets[tokens.size(0) :] = -1
        return idx, targets, tokens.size(0)


def _require_windows(windows: Windows, dataset: Dataset, split: str) -> None:
    if len(windows) == 0:
        problem = f"no shard of its {split} split holds a window of block_size={windows.block_size} + 1 tokens"
        raise DataError(f"dataset {dataset.folder}: {problem}; use a smaller --block_size or more text")


def to_device(tokens: np.ndarray | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 on a device, from tokens (B, T + 1) uint16. Two bytes per token are copied."""
    tokens = torch.as_tensor(tokens).to(device, non_blocking=True)
    ids = tokens.view(torch.int16).long() & 0xFFFF
    return ids[:, :-1], ids[:, 1:]


class ReadAhead:
    """This rank's batches of steps start, start + 1, ... as uint16 tensors, read on a thread before they are needed.

    pin: use page-locked memory, for asynchronous copies to a GPU. If a batch cannot be read, its DataError takes its
    place. Close it at the end: torch aborts a process that exits while another thread is inside torch.
    """

    KNOWN, DEPTH = 3, 6  # `take` waits for KNOWN batches; DEPTH batches are read or being read

    def __init__(self, loader: TrainLoader, start: int, pin: bool) -> None:
        self._loader, self._pin, self._next = loader, pin, start
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._batches: deque[Future[Tensor | DataError]] = deque()
        self._known: list[Tensor | DataError] = []

    def _read(self, step: int) -> Tensor | DataError:
        try:
            batch = torch.from_numpy(self._loader.batch(step))
        except DataError as error:
            return error
        return batch.pin_memory() if self._pin else batch

    def take(self) -> tuple[Any, Any]:
        """The next batch, and the one after it, which the next call returns again."""
        while len(self._batches) < self.DEPTH:
            self._batches.append(self._pool.submit(self._read, self._next))
            self._next += 1
        self._known = [batch.result() for batch in list(self._batches)[: self.KNOWN]]
        self._batches.popleft()
        return self._known[0], self._known[1]

    def error(self, needed: int) -> DataError | None:
        """The first error in the batch that was taken and the two after it. needed: how many of the three to check."""
        return next((b for b in self._known[: max(0, needed)] if isinstance(b, DataError)), None)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
