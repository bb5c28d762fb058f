"""The pipeline: chunks of documents become tokens, on all cores, and tokens become shards, in the order of the source.

Whenever a shard is finished, progress.json is replaced. It holds the position in the source, the shards so far, and
the name of a file with the tokens that are not yet in a shard. A preparation that was killed continues from there and
ends with the same bytes. The number of workers does not change them either.
"""

import json
import re
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.prepare.output import PROGRESS, begin, discard, progress, publish
from data.prepare.sources import Chunk, Source
from data.prepare.workers import Encoded, ShardSettings, encoded
from data.shards import SPLITS, DataError, ShardEntry, listed_shard, write_manifest, write_shard
from data.tokenizer import TOKENIZER_FILE, CustomTokenizer, Tokenizer, facts_of, get_tokenizer
from runtime.files import sha256_of, write_durably
from runtime.streams import printable

NOTICES = 20  # how many unreadable documents are named; all are counted


class ShardWriter:
    """Writes the shards of one stream. The first shard may belong to another split than the rest."""

    def __init__(self, folder: Path, splits: tuple[str, str], shard_tokens: int, eot: int | None) -> None:
        self.folder, self.splits, self.eot = folder, splits, eot
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.count = self.bytes = 0  # tokens in the buffer, and bytes of their text
        self.entries: list[ShardEntry] = []

    def split_of(self, number: int) -> str:
        return self.splits[min(number, 1)]

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append tokens (n,) uint16, which stand for text_bytes of UTF-8."""
        while len(tokens):
            n = min(len(tokens), len(self.buffer) - self.count)
            part_bytes = round(text_bytes * n / len(tokens))
            self.buffer[self.count : self.count + n] = tokens[:n]
            self.count, self.bytes = self.count + n, self.bytes + part_bytes
            tokens, text_bytes = tokens[n:], text_bytes - part_bytes
            if self.count == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write the buffer as a shard."""
        if self.count:
            number = len(self.entries)
            path = self.folder / f"{self.split_of(number)}_{number:06d}.bin"
            self.entries.append(write_shard(path, self.buffer[: self.count], self.bytes, self.eot))
            self.count = self.bytes = 0


class Preparation:
    """The state of a preparation: position in the source, documents read, and a writer for each stream."""

    def __init__(self, folder: Path, source: dict, shards: ShardSettings, eot: int | None) -> None:
        """eot: the token that ends documents, if its count is their number."""
        self.folder, self.source, self.split = folder, source, shards.split
        self.position: tuple[int, ...] = ()
        self.documents = self.unreadable = 0
        self.max_skipped, self.last = shards.max_skipped, ""  # last: names the last document that could not be read
        self.writers = [ShardWriter(folder, splits, shards.shard_tokens, eot) for splits in shards.split.streams]
        state = progress(folder) or {}
        if "position" in state:
            self._restore(state)

    @property
    def shards(self) -> int:
        """Number of finished shards."""
        return sum(len(w.entries) for w in self.writers)

    @property
    def tokens(self) -> int:
        """Number of tokens so far, in shards and in buffers."""
        return sum(w.count + sum(e.tokens for e in w.entries) for w in self.writers)

    def add(self, chunk: Chunk, result: Encoded) -> None:
        """Append the documents of a chunk to their streams, and record progress if that finished a shard."""
        before = self.shards
        streams = self.split.streams_of(self.documents, chunk.names, len(result.lengths))
        cuts = np.flatnonzero(np.diff(streams)) + 1  # between documents of different streams
        token_cuts = np.cumsum(result.lengths)[cuts - 1]
        runs = np.split(streams, cuts), np.split(result.tokens, token_cuts), np.split(result.sizes, cuts)
        for stream, tokens, sizes in zip(*runs, strict=True):
            self.writers[stream[0]].add(tokens, int(sizes.sum()))
        self.documents += len(result.lengths)
        for where in result.unreadable[: max(0, NOTICES - self.unreadable)]:
            line = printable(where).replace("\n", "\\x0a")
            tqdm.write(f"skipped {line}", file=sys.stderr)  # does not disturb the progress bar
        self.unreadable += len(result.unreadable)
        self.last = f"; the last one: {result.unreadable[-1]}" if result.unreadable else self.last
        if self.unreadable > max(100, self.max_skipped * self.documents):
            counts = f"{self.unreadable} of {self.documents} documents cannot be read"
            raise DataError(f"{counts}, more than --max_skipped {self.max_skipped:g} allows{self.last}")
        self.position = chunk.after
        if self.shards > before:
            self.save()

    def save(self) -> None:
        """Replace progress.json, after the tokens in the buffers are on the disk."""
        path = self.folder / f"buffered-{self.shards:06d}"
        digest = write_durably(path, *(w.buffer[: w.count] for w in self.writers))
        state = dict(source=self.source, position=self.position, documents=self.documents, unreadable=self.unreadable)
        state["buffered"] = dict(file=path.name, sha256=digest)
        state["streams"] = [
            dict(buffered=w.count, buffered_bytes=w.bytes, shards=[asdict(e) for e in w.entries]) for w in self.writers
        ]
        write_durably(self.folder / PROGRESS, (json.dumps(state) + "\n").encode())
        for old in self.folder.glob("buffered-*"):
            if old != path:
                old.unlink()

    def _restore(self, state: dict) -> None:
        try:
            self._read(state)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            path = self.folder / PROGRESS
            raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); start over with --fresh") from None

    def _read(self, state: dict) -> None:
        self.position = tuple(map(int, state["position"]))
        self.documents, self.unreadable = int(state["documents"]), int(state["unreadable"])
        name = state["buffered"]["file"]
        path = self.folder / name
        if (
            not re.fullmatch(r"buffered-\d+", name)
            or not path.is_file()
            or sha256_of(path) != state["buffered"]["sha256"]
        ):
            raise DataError(f"{path} is missing or damaged; start over with --fresh")
        tokens = np.fromfile(path, dtype="<u2")
        for writer, saved in zip(self.writers, state["streams"], strict=True):
            writer.count, writer.bytes = saved["buffered"], saved["buffered_bytes"]
            writer.buffer[: writer.count], tokens = tokens[: writer.count], tokens[writer.count :]
            writer.entries = [ShardEntry(**e) for e in saved["shards"]]
            for entry in saved["shards"]:
                listed_shard(self.folder, entry)

    def finish(self, tokenizer: Tokenizer) -> None:
        """Write the last shards and the manifest. Raises DataError, and deletes the folder, if a split is empty."""
        splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        for writer in self.writers:
            writer.flush()
            for number, entry in enumerate(writer.entries):
                splits[writer.split_of(number)].append(entry)
        empty = [split for split, entries in splits.items() if not entries]
        if empty:
            discard(self.folder)
            problem = f"no document fell into the {empty[0]} split; {self.split.hint}"
            if self.documents == self.unreadable:
                problem = f"the source holds no document that can be read{self.last}"
            raise DataError(f"{self.folder.name.removesuffix('.tmp')}: {problem}")
        counts = dict(documents=self.documents, unreadable=self.unreadable)
        write_manifest(self.folder, facts_of(tokenizer), self.source | {"read": counts}, splits)


def build(out: Path, source: Source, settings: dict, shards: ShardSettings) -> None:
    """Prepare the dataset folder `out`, or continue a preparation.

    settings: the facts about the source that the manifest records.
    A folder that is already there is replaced once the new one is complete.
    Raises DataError for a source, a folder or a tokenizer that cannot be used, OSError for a full disk.
    """
    tokenizer = get_tokenizer(shards.tokenizer, shards.ranks, shards.separator)
    ends: int | None
    folder, ends = begin(out, {"source": settings}), tokenizer.eot
    if isinstance(tokenizer, CustomTokenizer):
        ends = None  # its texts may contain the separator
        write_durably(folder / TOKENIZER_FILE, tokenizer.path.read_bytes())
    preparation = Preparation(folder, settings, shards, ends)
    look = dict(desc=printable(f"preparing {out.name}"), unit=" tokens", unit_scale=True, initial=preparation.tokens)
    interval = 0.1 if sys.stderr.isatty() else 60  # seconds between updates of the bar; a log gets one per minute
    chunks = source.chunks(preparation.position)
    with closing(chunks), tqdm(**look, mininterval=interval) as bar, closing(encoded(chunks, shards)) as results:
        for chunk, result in results:
            preparation.add(chunk, result)
            if chunk.fraction:
                bar.total = round(preparation.tokens / chunk.fraction)
            bar.update(len(result.tokens))
    preparation.finish(tokenizer)
    publish(folder, out)
