"""What each source is: where it lies, which documents are for validation, where end-of-text goes.

A job's `settings` are what the command line decides; `open` adds what only the source knows (its commit,
its number of documents) and gives them back from an interrupted preparation, so that it continues with
the very same source.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from data.prepare import pydocs, text
from data.prepare.hub import HubFolder
from data.prepare.sources import Files, Folder, LocalFolder, Named, Source
from data.prepare.split import ByName, FirstShard, NanoGPT, Split
from data.shards import DataError


@dataclass(frozen=True)
class Hub:
    """A corpus on the hub: its repository, and the commit that is read unless --revision names another."""

    repo: str
    commit: str


HUB = {
    "openwebtext": Hub("Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c"),  # 8,013,769 documents
    "fineweb_edu": Hub("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),  # 10BT: 9,672,101
}
PINNED = ("revision", "documents", "read")  # what the source says of itself, and what was read of it


@dataclass(frozen=True)
class Job:
    """A named preparation; open(pinned settings) makes its source and split."""

    name: str
    settings: dict
    open: Callable[[dict], tuple[Source, Split, dict]]


def pydocs_job(args: argparse.Namespace) -> Job:
    """Prose of the installed packages."""
    settings = pydocs.source() | {"val_fraction": args.val_fraction, "eot": "after"}
    return Job("pydocs", settings, lambda pinned: (Named(pydocs.documents()), ByName(args.val_fraction), {}))


def text_job(args: argparse.Namespace) -> Job:
    """The user's text files."""
    files = text.text_files(args.root, args.glob)
    root = args.root.resolve()
    sizes = [(p.relative_to(args.root).as_posix(), p.stat().st_size) for p in files]
    settings = {"name": "text", "root": str(root), "glob": args.glob, "val_fraction": args.val_fraction}
    settings |= {"files": len(files), "files_sha256": hashlib.sha256(repr(sizes).encode()).hexdigest(), "eot": "after"}
    documents = text.documents(args.root, files)
    return Job(root.name, settings, lambda pinned: (Named(documents), ByName(args.val_fraction), {}))


def openwebtext_job(args: argparse.Namespace) -> Job:
    """OpenWebText with nanoGPT's validation documents, end-of-text behind each document."""
    split = {"split": "nanogpt", "val_fraction": NanoGPT.fraction, "val_seed": NanoGPT.seed, "eot": "after"}
    return _corpus(args, "openwebtext", "openwebtext", "*train-*.parquet", split)


def fineweb_edu_job(args: argparse.Namespace) -> Job:
    """A sample of FineWeb-Edu, its first shard for validation, end-of-text before each document."""
    split = {"split": "first shard", "eot": "before"}
    return _corpus(args, "fineweb_edu", f"fineweb_edu_{args.sample[:-1]}", f"sample/{args.sample}/*.parquet", split)


def _corpus(args: argparse.Namespace, name: str, folder_name: str, pattern: str, split: dict) -> Job:
    """A corpus from the hub, or from files like it that the user has."""
    settings = {"name": name, "column": args.column, **split}
    local = LocalFolder(args.source) if args.source else None
    revision = args.revision or (HUB[name].commit if args.repo == HUB[name].repo else "main")
    if local:
        settings |= {"root": str(args.source.resolve()), "files": len(local.files), "files_sha256": local.digest()}
    else:
        settings |= {"repo": args.repo, "pattern": args.pattern or pattern, "asked_revision": revision}

    def start(pinned: dict) -> tuple[Source, Split, dict]:
        facts: dict = {}
        folder: Folder
        if local:
            folder = local
        else:
            folder = HubFolder(args.repo, settings["pattern"], pinned.get("revision", revision))
            facts["revision"] = folder.revision
        files = Files(folder, args.column)
        if split["split"] != "nanogpt":
            return files, FirstShard(), facts
        facts["documents"] = pinned.get("documents") or files.documents()
        return files, NanoGPT(facts["documents"]), facts

    return Job(folder_name, settings, start)


JOBS = {"pydocs": pydocs_job, "text": text_job, "openwebtext": openwebtext_job, "fineweb_edu": fineweb_edu_job}


def changed(there: dict, now: dict) -> list[str]:
    """Settings that differ, without those that only the source knows."""
    return sorted(k for k in there | now if k not in PINNED and there.get(k) != now.get(k))


@dataclass(frozen=True)
class Ready:
    """Token shards of others that share our header."""

    repo: str
    pattern: str


# By their repositories' names; GPT-2 tokens, end-of-text before each document, "val" in a file's name: validation.
READY = {
    "fineweb_10B": Ready("kjj0/fineweb10B-gpt2", "fineweb_*.bin"),
    "fineweb_100B": Ready("kjj0/fineweb100B-gpt2", "fineweb_*.bin"),
    "fineweb_edu_10B": Ready("kjj0/finewebedu10B-gpt2", "finewebedu_*.bin"),
    "fineweb_edu_100B": Ready("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb_*.bin"),
}


def ready_shards(args: argparse.Namespace) -> tuple[str, Ready]:
    """Name and place of the ready-made shards that the command line means."""
    if args.repo or args.pattern:
        if not (args.repo and args.pattern):
            raise DataError("--repo and --pattern go together, for example --pattern 'fineweb_*.bin'")
        return args.repo.rpartition("/")[2], Ready(args.repo, args.pattern)
    if args.which not in READY:
        raise DataError(f"name one of {', '.join(READY)}, or give --repo and --pattern, or --source DIR")
    return args.which, READY[args.which]
