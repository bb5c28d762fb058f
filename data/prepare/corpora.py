"""What each command prepares: the source, which documents are for validation, and where end-of-text goes.

The settings of a job follow from the command line. The source adds what only it knows: its commit and its number of
documents. An interrupted preparation gets these back as `pinned`, so that it continues with the same source.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.prepare import pretokenized, pydocs, text
from data.prepare.build import build
from data.prepare.hub import HubFolder
from data.prepare.sources import Files, Folder, LocalFolder, Named, Source
from data.prepare.split import ByName, FirstShard, NanoGPT, Split
from data.prepare.workers import Recipe
from data.shards import DataError


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub, as parquet files with a column of text."""

    repo: str
    commit: str  # read unless --revision names another
    pattern: str  # of its files
    split: type[NanoGPT | FirstShard]
    eot: str  # end-of-text "before" or "after" each document
    samples: tuple[str, ...] = ("",)  # choices of --sample, which may appear in the pattern


CORPORA = {
    "openwebtext": Corpus(  # 8,013,769 documents
        "Skylion007/openwebtext",
        "79d93d786212f7344586290adb811d4ae6a1762c",
        "*train-*.parquet",
        NanoGPT,
        "after",
    ),
    "fineweb_edu": Corpus(  # 10BT: 9,672,101 documents
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        "sample/{sample}/*.parquet",
        FirstShard,
        "before",
        samples=("10BT", "100BT"),
    ),
}

# GPT-2 token shards by others: repository and files. A file with "val" in its name is for validation.
PRETOKENIZED = {
    "fineweb_10B": ("kjj0/fineweb10B-gpt2", "fineweb_*.bin"),
    "fineweb_100B": ("kjj0/fineweb100B-gpt2", "fineweb_*.bin"),
    "fineweb_edu_10B": ("kjj0/finewebedu10B-gpt2", "finewebedu_*.bin"),
    "fineweb_edu_100B": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb_*.bin"),
}


@dataclass(frozen=True)
class Job:
    """A preparation: the name of its folder, its settings, and make(out, pinned), which does it or continues it."""

    name: str
    settings: dict
    make: Callable[[Path, dict], None]


def _build_job(
    args: argparse.Namespace, name: str, settings: dict, open_source: Callable[[dict], tuple[Source, Split, dict]]
) -> Job:
    """open_source(pinned): the source, the split, and facts that are added to the settings."""
    settings = settings | {"tokenizer": args.tokenizer, "shard_tokens": args.shard_tokens}

    def make(out: Path, pinned: dict) -> None:
        source, split, facts = open_source(pinned)
        recipe = Recipe(args.tokenizer, args.ranks, settings["eot"], split, args.shard_tokens, args.workers)
        build(out, source, settings | facts, recipe)

    return Job(name, settings, make)


def pydocs_job(args: argparse.Namespace) -> Job:
    """Prose of the installed packages."""
    settings = pydocs.source() | {"val_fraction": args.val_fraction, "eot": "after"}
    return _build_job(args, "pydocs", settings, lambda _: (Named(pydocs.documents()), ByName(args.val_fraction), {}))


def text_job(args: argparse.Namespace) -> Job:
    """The user's text files."""
    files = text.text_files(args.root, args.glob)
    sizes = [(p.relative_to(args.root).as_posix(), p.stat().st_size) for p in files]
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
    root = args.root.resolve()
    settings = {"name": "text", "root": str(root), "glob": args.glob, "val_fraction": args.val_fraction}
    settings |= {"files": len(files), "files_sha256": digest, "eot": "after"}
    documents = text.documents(args.root, files)
    return _build_job(args, root.name, settings, lambda _: (Named(documents), ByName(args.val_fraction), {}))


def corpus_job(args: argparse.Namespace) -> Job:
    """A corpus from the hub, or from files like it that the user has."""
    corpus = CORPORA[args.command]
    settings = {"name": args.command, "column": args.column, **corpus.split.settings, "eot": corpus.eot}
    local = LocalFolder(args.source) if args.source else None
    revision = args.revision or (corpus.commit if args.repo == corpus.repo else "main")
    pattern = args.pattern or corpus.pattern.format(sample=args.sample)
    if local:
        settings |= {"root": str(args.source.resolve()), "files": len(local.files), "files_sha256": local.digest()}
    else:
        settings |= {"repo": args.repo, "pattern": pattern, "asked_revision": revision}

    def open_source(pinned: dict) -> tuple[Source, Split, dict]:
        folder: Folder = local or HubFolder(args.repo, pattern, pinned.get("revision", revision))
        files = Files(folder, args.column)
        facts = {"revision": folder.revision} if isinstance(folder, HubFolder) else {}
        if corpus.split is NanoGPT:
            facts["documents"] = pinned.get("documents") or files.documents()
        return files, corpus.split(facts.get("documents", 0)), facts

    name = f"{args.command}_{args.sample[:-1]}" if args.sample else args.command
    return _build_job(args, name, settings, open_source)


def pretokenized_job(args: argparse.Namespace) -> Job:
    """Token shards from the hub."""
    if bool(args.repo) != bool(args.pattern):
        raise DataError("--repo and --pattern go together, for example --pattern 'fineweb_*.bin'")
    if not args.repo and args.which not in PRETOKENIZED:
        raise DataError(f"name one of {', '.join(PRETOKENIZED)}, or give --repo and --pattern, or --source DIR")
    name = args.repo.rpartition("/")[2] if args.repo else args.which
    repo, pattern = (args.repo, args.pattern) if args.repo else PRETOKENIZED[args.which]
    settings = {"name": "pretokenized", "repo": repo, "pattern": pattern}
    settings |= {"asked_revision": args.revision or "main", "shards": args.shards}
    return Job(name, settings, lambda out, pinned: pretokenized.fetch(out, settings, pinned))


JOBS = {"pydocs": pydocs_job, "text": text_job, "pretokenized": pretokenized_job, **dict.fromkeys(CORPORA, corpus_job)}
