"""Turn text into a folder of token shards.

    python -m data.prepare pydocs
    python -m data.prepare text --root ~/books --glob '**/*.txt' --tokenizer gpt2

The folder appears, complete, only when the last shard is on the disk.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a file: python data/prepare.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from data import pydocs
from data.shards import MANIFEST, SPLITS, DataError, ShardEntry, open_dataset, write_manifest, write_shard
from data.tokenizer import Tokenizer, get_tokenizer

PIECE_BYTES = 1 << 16  # larger files are cut into pieces of this size, so that validation sees some of each
MIN_PIECES = 200  # smaller corpora are cut finer, so that there is a validation set at all


class ShardWriter:
    """Collects the documents of one split into shards of `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.entries: list[ShardEntry] = []
        self.parts: list[np.ndarray] = []
        self.held = self.held_bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document's tokens (n,) uint16, which stand for text_bytes of UTF-8."""
        self.parts.append(tokens)
        self.held += len(tokens)
        self.held_bytes += text_bytes
        while self.held >= self.shard_tokens:
            everything = np.concatenate(self.parts)
            share = round(self.held_bytes * self.shard_tokens / self.held)
            self._write(everything[: self.shard_tokens], share)
            self.parts, self.held = [everything[self.shard_tokens :]], self.held - self.shard_tokens
            self.held_bytes -= share

    def close(self) -> list[ShardEntry]:
        """Write what is left and return the entries of all shards."""
        if self.held:
            self._write(np.concatenate(self.parts), self.held_bytes)
        return self.entries

    def _write(self, tokens: np.ndarray, text_bytes: int) -> None:
        path = self.folder / f"{self.split}_{len(self.entries):06d}.bin"
        self.entries.append(write_shard(path, tokens, text_bytes))


def in_validation(name: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < fraction * 2**32


def text_documents(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every UTF-8 file under root that matches the glob, large files in pieces.

    Raises DataError if nothing matches; files that are not UTF-8 are skipped and named.
    """
    files = sorted(p for p in root.glob(pattern) if p.is_file())
    if not files:
        raise DataError(f'no file under {root} matches "{pattern}"')
    piece = min(PIECE_BYTES, max(512, sum(p.stat().st_size for p in files) // MIN_PIECES))
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            print(f"skipped {path}: not UTF-8 (byte {error.start})", file=sys.stderr)
            continue
        yield from _pieces(name, text, piece)


def _pieces(name: str, text: str, size: int) -> Iterator[tuple[str, str]]:
    """Cut a text at line ends into pieces of about `size` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1
        if end == 0 or len(text) - end < size // 2:
            end = len(text)
        yield f"{name}#{start}", text[start:end]
        start = end


def build(
    out: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    source: dict,
    val_fraction: float,
    shard_tokens: int,
) -> None:
    """Tokenize documents (name, text), each followed by end-of-text, and write the dataset folder `out`.

    A folder that is already there is replaced once the new one is complete.

    Raises DataError if either split ends up empty.
    """
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    writers = {split: ShardWriter(aside, split, shard_tokens) for split in SPLITS}
    for name, text in tqdm(documents, desc=f"preparing {out.name}", unit=" documents", disable=None):
        tokens = np.array([*tokenizer.encode(text), tokenizer.eot], dtype=np.uint16)
        split = "val" if in_validation(name, val_fraction) else "train"
        writers[split].add(tokens, len(text.encode("utf-8", errors="surrogateescape")))
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, entries in splits.items():
        if not entries:
            shutil.rmtree(aside)
            raise DataError(f"{out}: no document fell into the {split} split; give more text or another --val-fraction")
    facts = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
    write_manifest(aside, facts, source, splits)
    if out.exists():
        shutil.rmtree(out)
    aside.rename(out)


def describe(out: Path) -> str:
    """One line on a prepared folder."""
    manifest = json.loads((out / MANIFEST).read_text())
    vocab_size = manifest["tokenizer"]["vocab_size"]
    dataset = open_dataset(out, vocab_size)
    counts = ", ".join(f"{split} {dataset.tokens(split):,} tokens" for split in SPLITS)
    return f"{out}: {counts}, tokenizer {manifest['tokenizer']['name']} ({vocab_size} ids)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data.prepare", description="Turn text into a folder of token shards.")
    sources = parser.add_subparsers(dest="source", required=True)
    pydocs_parser = sources.add_parser("pydocs", help="prose of the installed Python packages: needs no download")
    text_parser = sources.add_parser("text", help="your own UTF-8 text files")
    text_parser.add_argument("--root", type=Path, required=True, help="folder to search")
    text_parser.add_argument("--glob", default="**/*.txt", help="which files in it (default: %(default)s)")
    for p in (pydocs_parser, text_parser):
        p.add_argument("--out", type=Path, help="dataset folder (default: data/tokens/NAME)")
        p.add_argument("--tokenizer", choices=("byte", "gpt2"), default="byte")
        p.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
        p.add_argument("--val-fraction", type=float, default=0.05, help="share of documents for validation")
        p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard")
        p.add_argument("--fresh", action="store_true", help="replace an existing folder of other settings")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.val_fraction < 1:
            raise DataError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
        if args.shard_tokens < 1:
            raise DataError(f"--shard-tokens {args.shard_tokens}: must be at least 1")
        prepare(args)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"data.prepare: {error}")


def prepare(args: argparse.Namespace) -> None:
    """Do what the command line asks, or find that it is done already."""
    if args.source == "pydocs":
        name, source = "pydocs", pydocs.source()
        documents = pydocs.documents()
    else:
        if not args.root.is_dir():
            raise DataError(f"--root {args.root}: no such folder")
        name = args.root.resolve().name
        source = {"name": "text", "root": str(args.root.resolve()), "glob": args.glob}
        documents = text_documents(args.root, args.glob)
    source |= {"tokenizer": args.tokenizer, "val_fraction": args.val_fraction, "shard_tokens": args.shard_tokens}
    out = args.out or Path("data/tokens") / name
    if out.exists():
        there = json.loads((out / MANIFEST).read_text())["source"] if (out / MANIFEST).exists() else {}
        if there == source and not args.fresh:
            print(f"already prepared: {describe(out)}")
            return
        if not args.fresh:
            changed = sorted(k for k in there | source if there.get(k) != source.get(k))
            raise DataError(f"{out} exists with other settings ({', '.join(changed)}); give --fresh to replace it")
    tokenizer = get_tokenizer(args.tokenizer, args.ranks)
    build(out, documents, tokenizer, source, args.val_fraction, args.shard_tokens)
    print(f"prepared {describe(out)}")


if __name__ == "__main__":
    main()
