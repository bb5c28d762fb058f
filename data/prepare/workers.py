"""Tokenization on all cores, with results in the order of the source."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process

import numpy as np

from data.prepare.sources import Chunk, Undecodable
from data.prepare.split import Split
from data.shards import DataError
from data.tokenizer import CustomTokenizer, get_tokenizer, pieces


@dataclass(frozen=True)
class ShardSettings:
    """How documents become shards."""

    tokenizer: str  # its name or its file
    ranks: str | None
    eot: str  # end-of-text "before" or "after" each document
    split: Split
    shard_tokens: int
    workers: int
    separator: str | None = None  # the end-of-text token of a file, if it is not found by itself
    max_skipped: float = 0.1  # fraction of documents that may be unreadable, once there are 100


@dataclass
class Encoded:
    """Tokens (n,) uint16 of a chunk, and for each document its number of tokens and of UTF-8 bytes."""

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    unreadable: list[str]


load_tokenizer = lru_cache(get_tokenizer)


def encode(chunk: Chunk, name: str, ranks: str | None, separator: str | None, eot: str) -> Encoded:
    """Tokenize a chunk. A document that cannot be read gets no token, and its place is returned.

    Raises DataError, which names the document if it has a name, for text that the tokenizer cannot encode.
    """
    tokenizer = load_tokenizer(name, ranks, separator)
    end = np.array([tokenizer.eot], dtype=np.uint16)
    parts, lengths, sizes, unreadable = [np.empty(0, dtype=np.uint16)], [], [], []
    for number, text in enumerate(chunk.texts()):
        document, size = [], 0
        if isinstance(text, Undecodable):
            unreadable.append(text.where)
        else:
            # pieces avoid a second copy of an enormous document; a custom tokenizer may have tokens across their ends
            for piece in [text] if isinstance(tokenizer, CustomTokenizer) else pieces(text):
                # JSON can hold lone surrogates, UTF-8 cannot; they become replacement characters
                piece = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                try:
                    document.append(tokenizer.encode_array(piece))
                except ValueError as error:
                    where = f"document {chunk.names[number]}: " if chunk.names else ""
                    raise DataError(f"{where}{error}") from None
                size += len(piece.encode())
            document.insert(0 if eot == "before" else len(document), end)
        parts += document
        lengths.append(sum(map(len, document)))
        sizes.append(size)
    return Encoded(np.concatenate(parts), np.array(lengths), np.array(sizes), unreadable)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if parent := parent_process():
        connection.wait([parent.sentinel])
    os._exit(1)


def encoded(chunks: Iterator[Chunk], settings: ShardSettings) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Yield every chunk with its tokens, in order. At most two chunks per worker are read ahead."""
    how = (settings.tokenizer, settings.ranks, settings.separator, settings.eot)
    if settings.workers == 1:
        yield from ((chunk, encode(chunk, *how)) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(settings.workers, get_context("spawn"), _start_worker)
    waiting: deque[tuple[Chunk, Future]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(encode, chunk, *how)))
            if len(waiting) > 2 * settings.workers:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()
    except BrokenProcessPool:
        problem = f"one of {settings.workers} workers died, probably because memory is short"
        raise DataError(f"{problem}; the same command continues, and may be given fewer --workers") from None
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C here would leave workers behind
        pool.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGINT, before)
