"""What each command prepares: the source, which documents are for validation, and where end-of-text goes.

The settings of a plan follow from the command line. Its source adds facts: its commit and its number of documents. A
continued preparation gets the recorded ones back as `pinned`, so that it reads the same source.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from data.prepare import pydocs, text
from data.prepare.hub import hub_files
from data.prepare.sources import SUFFIXES, Files, Named, Source, local_files
from data.prepare.split import ByName, FirstShard, NanoGPT, Split
from data.shards import DataError


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub, as parquet files with a column of text."""

    repo: str
    commit: str  # read unless --revision names another
    pattern: str  # glob for its files
    split: type[NanoGPT | FirstShard]
    eot: str  # end-of-text "before" or "after" each document
    samples: tuple[str, ...] = ("",)  # choices of --sample, which may appear in the pattern


CORPORA = {
    "openwebtext": Corpus(  # 8,013,769 documents
        repo="Skylion007/openwebtext",
        commit="79d93d786212f7344586290adb811d4ae6a1762c",
        pattern="*train-*.parquet",
        split=NanoGPT,
        eot="after",
    ),
    "fineweb_edu": Corpus(  # 9,672,101 documents in 10BT
        repo="HuggingFaceFW/fineweb-edu",
        commit="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        pattern="sample/{sample}/*.parquet",
        split=FirstShard,
        eot="before",
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
class PreparationPlan:
    """A preparation: the name of its folder, its settings, and open(pinned), which gives source, split and facts."""

    name: str
    settings: dict
    open: Callable[[dict], tuple[Source, Split, dict]]


def pydocs_plan(args: argparse.Namespace) -> PreparationPlan:
    """Prose of the installed packages."""
    settings = pydocs.source() | {"val_fraction": args.val_fraction, "eot": "after"}
    return PreparationPlan(
        "pydocs", settings, lambda pinned: (Named(pydocs.documents()), ByName(args.val_fraction), {})
    )


def text_plan(args: argparse.Namespace) -> PreparationPlan:
    """The user's text files."""
    if args.glob and args.root.is_file():
        raise DataError(f"--glob {args.glob[0]}: --root {args.root} is a file; give a folder or no --glob")
    globs = args.glob or [text.GLOB]
    files, folder = text.text_files(args.root, globs, args.exclude), args.root
    if args.root.is_file():
        folder = args.root.parent
    else:
        text.say_what_is_left_out(folder, files, args.exclude, f"match --glob {' '.join(globs)}")
    sizes = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
    root = args.root.resolve()
    settings = {"name": "text", "root": str(root), "glob": " ".join(globs), "val_fraction": args.val_fraction}
    settings |= {"files": len(files), "files_sha256": digest, "eot": "after"}
    settings |= {"exclude": sorted(set(args.exclude))} if args.exclude else {}
    settings |= {"column": args.column} if any(map(text.holds_records, files)) else {}
    documents = text.documents(folder, files, args.column)
    name = root.name if args.root.is_dir() else root.stem
    return PreparationPlan(name, settings, lambda pinned: (Named(documents), ByName(args.val_fraction), {}))


def corpus_plan(args: argparse.Namespace) -> PreparationPlan:
    """A corpus from the hub, or from files like it that the user has."""
    corpus = CORPORA[args.command]
    settings = {"name": args.command, "column": args.column, **corpus.split.settings, "eot": corpus.eot}
    local = local_files(args.source, args.exclude) if args.source else None
    revision = args.revision or (corpus.commit if args.repo == corpus.repo else "main")
    pattern = args.pattern or corpus.pattern.format(sample=args.sample)
    if local:
        paths = [args.source / file.name for file in local]
        text.say_what_is_left_out(args.source, paths, args.exclude, f"end in {', '.join(SUFFIXES)}")
        digest = hashlib.sha256(repr([(f.name, f.size) for f in local]).encode()).hexdigest()[:16]
        settings |= {"root": str(args.source.resolve()), "files": len(local), "files_sha256": digest}
        settings |= {"exclude": sorted(set(args.exclude))} if args.exclude else {}
    else:
        settings |= {"repo": args.repo, "pattern": pattern, "asked_revision": revision}

    def start(pinned: dict) -> tuple[Source, Split, dict]:
        facts: dict = {}
        if (found := local) is None:
            facts["revision"], found = hub_files(args.repo, pattern, pinned.get("revision", revision))
        files = Files(found, args.column)
        if corpus.split is FirstShard:
            return files, FirstShard(), facts
        facts["documents"] = pinned.get("documents") or files.documents()
        return files, NanoGPT(facts["documents"]), facts

    name = f"{args.command}_{args.sample[:-1]}" if args.sample else args.command
    return PreparationPlan(name, settings, start)


PLANS = {"pydocs": pydocs_plan, "text": text_plan, **dict.fromkeys(CORPORA, corpus_plan)}


def pretokenized_settings(args: argparse.Namespace) -> tuple[str, dict]:
    """Name and settings of token shards from the hub."""
    if bool(args.repo) != bool(args.pattern):
        raise DataError("--repo and --pattern go together, for example --pattern 'fineweb_*.bin'")
    if not args.repo and args.which not in PRETOKENIZED:
        raise DataError(f"name one of {', '.join(PRETOKENIZED)}, or give --repo and --pattern, or --source DIR")
    name = args.repo.rpartition("/")[2] if args.repo else args.which
    repo, pattern = (args.repo, args.pattern) if args.repo else PRETOKENIZED[args.which]
    settings = {"name": "pretokenized", "repo": repo, "pattern": pattern}
    return name, settings | {"asked_revision": args.revision or "main", "shards": args.shards}
