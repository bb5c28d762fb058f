"""The pipeline: chunks of documents -> tokens, on all cores -> shards, in the order of the source.

Everything is written to FOLDER.tmp, which becomes FOLDER when it is complete. Whenever a shard is
finished, progress.json is replaced: how far the source was read, the shards so far, and the name of a
file with the tokens read but not yet in a shard. Killed anywhere, a preparation continues from there and
ends with the same bytes. The number of workers does not change them either, as results are taken in order.
"""

import json
import shutil
import sys
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.prepare.place import LOCK, PROGRESS, aside, locked, progress, settle
from data.prepare.sources import Chunk, Source
from data.prepare.workers import Encoded, Recipe, encoded
from data.shards import (
    SPLITS,
    DataError,
    ShardEntry,
    listed_shard,
    write_manifest,
    write_shard,
)
from data.tokenizer import Tokenizer, get_tokenizer
from runtime.files import sha256_of, write_durably

NOTICES = 20  # documents that cannot be read are named up to this many, and all are counted


class ShardWriter:
    """Fills the shards of one stream of documents; the first shard may belong to another split than the rest."""

    def __init__(self, folder: Path, first: str, rest: str, shard_tokens: int, eot: int) -> None:
        self.folder, self.first, self.rest, self.eot = folder, first, rest, eot
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.held = self.held_bytes = 0
        self.entries: list[ShardEntry] = []

    def split_of(self, number: int) -> str:
        return self.rest if number else self.first

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append tokens (n,) uint16, which stand for text_bytes of UTF-8."""
        while len(tokens):
            n = min(len(tokens), len(self.buffer) - self.held)
            share = round(text_bytes * n / len(tokens))
            self.buffer[self.held : self.held + n] = tokens[:n]
            self.held, self.held_bytes = self.held + n, self.held_bytes + share
            tokens, text_bytes = tokens[n:], text_bytes - share
            if self.held == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is held as a shard."""
        if self.held:
            path = self.folder / f"{self.split_of(len(self.entries))}_{len(self.entries):06d}.bin"
            self.entries.append(write_shard(path, self.buffer[: self.held], self.held_bytes, self.eot))
            self.held = self.held_bytes = 0


class Preparation:
    """What a preparation has reached: position in the source, documents read, and one writer a stream."""

    def __init__(self, folder: Path, source: dict, recipe: Recipe, eot: int) -> None:
        self.folder, self.source, self.split = folder, source, recipe.split
        self.position: tuple[int, ...] = ()
        self.documents = self.unreadable = 0
        self.writers = [ShardWriter(folder, *names, recipe.shard_tokens, eot) for names in recipe.split.streams]
        if state := progress(folder):
            self._restore(state)

    @property
    def shards(self) -> int:
        return sum(len(w.entries) for w in self.writers)

    @property
    def tokens(self) -> int:
        return sum(w.held + sum(e.tokens for e in w.entries) for w in self.writers)

    def will_write(self, name: str) -> bool:
        """Whether a shard of this name is still to come."""
        split, _, number = name.removesuffix(".bin").rpartition("_")
        return number.isdigit() and any(
            int(number) >= len(w.entries) and w.split_of(int(number)) == split for w in self.writers
        )

    def take(self, chunk: Chunk, result: Encoded) -> None:
        """Append a chunk's documents to their streams, and write down where we are if that finished a shard."""
        before = self.shards
        stream = self.split.streams_of(self.documents, chunk.names, len(result.lengths))
        ends = np.cumsum(result.lengths)
        cuts = [0, *(np.flatnonzero(np.diff(stream)) + 1).tolist(), len(stream)] if len(stream) else [0]
        for a, b in pairwise(cuts):  # runs of documents of one stream
            start = int(ends[a - 1]) if a else 0
            self.writers[stream[a]].add(result.tokens[start : ends[b - 1]], int(result.sizes[a:b].sum()))
        self.documents += len(result.lengths)
        for where in result.unreadable[: max(0, NOTICES - self.unreadable)]:
            tqdm.write(f"skipped {where}", file=sys.stderr)  # on a line of its own
        self.unreadable += len(result.unreadable)
        self.position = chunk.after
        if self.shards > before:
            self.save()

    def save(self) -> None:
        """Replace progress.json; the tokens it speaks of are on the disk before it is."""
        held = self.folder / f"held-{self.shards:06d}"
        digest = write_durably(held, *(w.buffer[: w.held] for w in self.writers))
        state = dict(source=self.source, position=self.position, documents=self.documents, unreadable=self.unreadable)
        state["held"] = dict(file=held.name, sha256=digest)
        state["streams"] = [
            dict(held=w.held, held_bytes=w.held_bytes, shards=[asdict(e) for e in w.entries]) for w in self.writers
        ]
        write_durably(self.folder / PROGRESS, (json.dumps(state) + "\n").encode())
        for old in self.folder.glob("held-*"):
            if old != held:
                old.unlink()

    def _restore(self, state: dict) -> None:
        self.position, self.documents = tuple(state["position"]), state["documents"]
        self.unreadable = state["unreadable"]
        path = self.folder / state["held"]["file"]
        if not path.exists() or sha256_of(path) != state["held"]["sha256"]:
            raise DataError(f"{path} is missing or damaged; start over with --fresh")
        held = np.fromfile(path, dtype="<u2")
        for writer, told in zip(self.writers, state["streams"], strict=True):
            writer.held, writer.held_bytes = told["held"], told["held_bytes"]
            writer.buffer[: writer.held], held = held[: writer.held], held[writer.held :]
            writer.entries = [ShardEntry(**e) for e in told["shards"]]

    def finish(self, tokenizer: Tokenizer) -> None:
        """Write the last shards and the manifest."""
        for writer in self.writers:
            writer.flush()
        splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        for writer in self.writers:
            for number, entry in enumerate(writer.entries):
                splits[writer.split_of(number)].append(entry)
        problem = "" if self.documents > self.unreadable else "the source holds no document that can be read"
        for split, entries in splits.items():
            if not entries and not problem:
                problem = f"no document fell into the {split} split; {self.split.remedy}"
        if problem:
            shutil.rmtree(self.folder)
            raise DataError(f"{self.folder.name.removesuffix('.tmp')}: {problem}")
        facts = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
        counts = dict(documents=self.documents, unreadable=self.unreadable)
        write_manifest(self.folder, facts, self.source | {"read": counts}, splits)


def build(out: Path, source: Source, settings: dict, recipe: Recipe) -> None:
    """Prepare the dataset folder `out`, or continue to; settings: what the manifest says of the source.

    A folder that is already there is replaced once the new one is complete.
    Raises DataError for a source, a folder or a tokenizer that cannot be used, OSError for a full disk.
    """
    tokenizer = get_tokenizer(recipe.tokenizer, recipe.ranks)
    folder = aside(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        preparation = Preparation(folder, settings, recipe, tokenizer.eot)
        sweep(folder, preparation)
        if not preparation.position:
            preparation.save()  # what the source said of itself holds from here on
        start = preparation.tokens
        seldom = 0.1 if sys.stderr.isatty() else 60  # seconds between reports; in a log, one a minute
        look = dict(desc=f"preparing {out.name}", unit=" tokens", unit_scale=True, mininterval=seldom)
        chunks = source.chunks(preparation.position)
        with closing(chunks), tqdm(**look, initial=start) as bar, closing(encoded(chunks, recipe)) as results:
            for chunk, result in results:
                preparation.take(chunk, result)
                if chunk.fraction:
                    bar.total = round(preparation.tokens / chunk.fraction)
                bar.update(len(result.tokens))
        preparation.finish(tokenizer)
        settle(folder, out)


def sweep(folder: Path, preparation: Preparation) -> None:
    """Check the shards so far and drop half-written files; DataError for a file that is not of this preparation."""
    expected = set()
    for writer in preparation.writers:
        for entry in writer.entries:
            listed_shard(folder, asdict(entry))
            expected.add(entry.file)
    for path in folder.iterdir():
        ours = path.name in expected | {PROGRESS, LOCK} or path.name.startswith("held-")
        if path.name.endswith(".tmp") or (path.suffix == ".bin" and preparation.will_write(path.name)):
            path.unlink()  # left by a kill
        elif not ours:
            raise DataError(f"{path}: not a shard of this preparation; move it away")
