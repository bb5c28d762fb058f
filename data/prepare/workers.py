"""Tokenization on all cores, with results in the order of the source."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

import numpy as np

from data.prepare.sources import Chunk, Undecodable
from data.prepare.split import Split
from data.shards import DataError
from data.tokenizer import Encoder, get_tokenizer, pieces

AHEAD = 1 << 28  # bytes of documents handed out and not yet taken back


@dataclass(frozen=True)
class Recipe:
    """What turns documents into shards, beside the documents."""

    tokenizer: str
    ranks: str | None
    eot: str  # end-of-text "before" or "after" each document
    split: Split
    shard_tokens: int
    workers: int


@dataclass
class Encoded:
    """A chunk's tokens (n,) uint16, and per document the number of tokens and of UTF-8 bytes."""

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    unreadable: list[str]


def encode(chunk: Chunk, tokenizer: Encoder, eot: str) -> Encoded:
    """Tokenize a chunk; a document that cannot be read gets no token at all and is named."""
    end = np.array([tokenizer.eot], dtype=np.uint16)
    parts, lengths, sizes, unreadable = [], [], [], []
    for text in chunk.texts():
        if isinstance(text, Undecodable):
            unreadable.append(text.where)
            lengths.append(0)
            sizes.append(0)
            continue
        body, size = [], 0
        for piece in pieces(text):  # an enormous document is encoded without another whole copy of it
            try:
                size += len(piece.encode())
            except UnicodeEncodeError:  # lone surrogates, which JSON can spell and UTF-8 cannot
                piece = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                size += len(piece.encode())
            body.append(tokenizer.encode_array(piece))
        document = [end, *body] if eot == "before" else [*body, end]
        parts += document
        lengths.append(sum(map(len, document)))
        sizes.append(size)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
    return Encoded(tokens, np.array(lengths, dtype=np.int64), np.array(sizes, dtype=np.int64), unreadable)


_worker_state: tuple[Encoder, str]


def _start_worker(name: str, ranks: str | None, eot: str) -> None:
    """Make the tokenizer once, leave Ctrl-C to the parent, and end when the parent does."""
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_state = get_tokenizer(name, ranks), eot


@contextmanager
def undisturbed() -> Iterator[None]:
    """Where a Ctrl-C would leave something undone: it is heeded at the end."""
    came: list[int] = []
    heeded = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heeded)
    if came:
        raise KeyboardInterrupt


def _die_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode(chunk, *_worker_state)


def encoded(chunks: Iterator[Chunk], recipe: Recipe) -> Iterator[tuple[Chunk, Encoded]]:
    """Every chunk with its tokens, in order, at most two chunks a worker and AHEAD bytes ahead."""
    if recipe.workers == 1:
        tokenizer = get_tokenizer(recipe.tokenizer, recipe.ranks)
        for chunk in chunks:
            yield chunk, encode(chunk, tokenizer, recipe.eot)
        return
    arguments = (recipe.tokenizer, recipe.ranks, recipe.eot)
    pool = ProcessPoolExecutor(recipe.workers, get_context("spawn"), _start_worker, arguments)
    waiting: deque[tuple[Chunk, Future]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            while len(waiting) > 2 * recipe.workers or sum(c.held for c, _ in waiting) > AHEAD:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {recipe.workers} workers died, most likely for lack of memory; the same command "
            "continues, with fewer --workers if need be"
        ) from None
    finally:
        with undisturbed():  # a second Ctrl-C in here would leave workers waiting
            pool.shutdown(wait=True, cancel_futures=True)
