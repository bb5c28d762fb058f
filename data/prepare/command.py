"""Turn text into a folder of token shards, and prove what was made.

    python -m data.prepare pydocs                               prose of the installed packages, no download
    python -m data.prepare text --root ~/books --glob '**/*.txt' --tokenizer gpt2
    python -m data.prepare openwebtext                          9 billion tokens
    python -m data.prepare fineweb_edu --sample 100BT
    python -m data.prepare openwebtext --source ~/owt           parquet, JSON lines or text you have
    python -m data.prepare pretokenized fineweb_edu_10B         ready-made token shards
    python -m data.prepare verify FOLDER
    python -m data.prepare info FOLDER config/gpt2_small.py [--key=value ...]

The folder appears, complete, only when the last shard is on the disk. An interrupted command continues
where it stopped when it is given again.
"""

import argparse
import errno
import os
import sys
from pathlib import Path

from data.prepare import pretokenized
from data.prepare.build import build
from data.prepare.corpora import HUB, JOBS, READY, Job, changed, ready_shards
from data.prepare.place import aside, begun, discard, locked, refuse_strangers, settle
from data.prepare.verify import describe, info, verify
from data.prepare.workers import Recipe
from data.shards import MANIFEST, DataError, open_dataset


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pydocs = commands.add_parser("pydocs", help="prose of the installed Python packages: needs no download")
    text = commands.add_parser("text", help="your own UTF-8 text files")
    text.add_argument("--root", type=Path, required=True, help="folder to search")
    text.add_argument("--glob", default="**/*.txt", help="which files in it (default: %(default)s)")
    for p in (pydocs, text):
        p.add_argument("--val-fraction", type=float, default=0.05, help="share of documents for validation")
    corpora = [commands.add_parser(name, help=f"{hub.repo} from the Hugging Face hub") for name, hub in HUB.items()]
    corpora[1].add_argument("--sample", choices=("10BT", "100BT"), default="10BT", help="which sample")
    for p, hub in zip(corpora, HUB.values(), strict=True):
        p.add_argument("--source", type=Path, help="read parquet, .jsonl or .txt (also .gz, .zst) files from here")
        p.add_argument("--repo", default=hub.repo, help="dataset repository (default: %(default)s)")
        p.add_argument("--pattern", help="which of its files")
        p.add_argument("--column", default="text", help="column or key of the text (default: %(default)s)")
    ready = commands.add_parser("pretokenized", help="GPT-2 token shards that somebody made")
    ready.add_argument("which", nargs="?", help=", ".join(READY))
    ready.add_argument("--source", type=Path, help="index this folder of shards in place")
    ready.add_argument("--repo", help="any other repository with such shards")
    ready.add_argument("--pattern", help="and which files in it")
    ready.add_argument("--shards", type=int, help="only this many training shards")
    for p in (*corpora, ready):
        pinned = "" if p is ready else "a pinned commit; of another --repo, "
        p.add_argument("--revision", help=f"commit, tag or branch, whose commit is kept (default: {pinned}main)")
    for p, tokenizer in ((pydocs, "byte"), (text, "byte"), *((c, "gpt2") for c in corpora)):
        p.add_argument("--tokenizer", choices=("byte", "gpt2"), default=tokenizer)
        p.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
        p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard")
        p.add_argument("--workers", type=int, default=cores(), help="processes (default: all cores)")
    for p in (pydocs, text, *corpora, ready):
        p.add_argument("--out", type=Path, help="dataset folder (default: data/tokens/NAME)")
        p.add_argument("--fresh", action="store_true", help="start over, and replace a finished folder")
    checks = [
        commands.add_parser("verify", help="check a folder"),
        commands.add_parser("info", help="describe a folder"),
    ]
    for p in checks:
        p.add_argument("folder", type=Path)
    checks[1].add_argument(
        "config", nargs="?", help="config file of a run, to state its epochs; --key=value may follow"
    )
    checks[1].add_argument("--budget", type=float, help="or the epochs that so many training tokens make")
    return parser


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "config", None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "verify":
            print(verify(args.folder))
        elif args.command == "info":
            print(info(args.folder, args.budget))
            if args.config:
                print(coverage(args.folder, args.config, rest))
        elif args.command == "pretokenized":
            check(args)
            prepare_ready(args)
        else:
            check(args)
            prepare(args, JOBS[args.command](args))
    except KeyboardInterrupt:
        again = "the same command" + (", without --fresh," if getattr(args, "fresh", False) else "")
        sys.exit(f"data.prepare: interrupted; {again} continues")
    except OSError as error:
        hint = "; make room there, the same command continues" if error.errno in (errno.ENOSPC, errno.EFBIG) else ""
        sys.exit(f"data.prepare: {error}{hint}")
    except (ValueError, ImportError) as error:
        sys.exit(f"data.prepare: {error}")


def coverage(folder: Path, config: str, overrides: list[str]) -> str:
    """What a run of a config file reads of a folder; DataError and ConfigError as the trainer would raise them."""
    from config.load import load_config
    from data.loader import TrainLoader, ValidationSet

    flag = "--as_published"
    run = load_config(config, [o for o in overrides if o != flag] + [f"--data.path={folder}"], flag in overrides)
    dataset = open_dataset(folder, run.model.vocab_size)
    sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
    train = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes)
    val = ValidationSet(dataset, run.data, micro_batch=1, **sizes)  # to count its windows
    budget = f"{run.total_steps:,} steps = {run.total_steps * run.tokens_per_step:,} tokens"
    return (
        f"  {'epochs':15} {train.epochs(run.total_steps):.2f} with {run.size}: {budget}\n"
        f"  {'validation':15} {val.count:,} of {len(val.windows):,} windows of {run.model.block_size:,} tokens"
    )


def check(args: argparse.Namespace) -> None:
    """DataError for numbers that make no sense."""
    if not 0 < getattr(args, "val_fraction", 0.5) < 1:
        raise DataError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
    for key, most in (("shard_tokens", 2**31 - 1), ("workers", 4096), ("shards", 2**31)):
        value = getattr(args, key, None)
        if value is not None and not 1 <= value <= most:
            raise DataError(f"--{key.replace('_', '-')} {value}: must be from 1 to {most}")


def target(args: argparse.Namespace, name: str) -> Path:
    """The dataset folder that is meant; DataError if a folder cannot be put there."""
    out = args.out or Path("data/tokens") / name
    out = out.resolve() if out.name in ("", "..") or out.is_symlink() else out
    if not out.name or out.is_mount() or (args.out is None and not name):
        raise DataError(f"--out {out}: give the name of a folder to be made")
    return out


def standing(out: Path, settings: dict, fresh: bool) -> dict | None:
    """What an unfinished preparation knows of its source, {} where there is none, None if `out` is done already.

    fresh: an unfinished one is dropped, and a finished one will be replaced.
    DataError if the place is taken by something else, or by a preparation with other settings.
    """
    folder = aside(out)
    refuse_strangers(folder)
    if fresh:
        refuse_strangers(out)
        if folder.exists():
            with locked(folder):
                discard(folder)
        return {}
    before = begun(folder)
    if before is not None:
        if different := changed(before, settings):
            raise DataError(
                f"{folder} was begun with other settings ({', '.join(different)}); repeat them or give --fresh"
            )
        print(f"continuing {folder}")
        return before
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    if not (out / MANIFEST).exists():
        raise DataError(f"{out} exists and has no {MANIFEST}: not a dataset made here; give another --out")
    if different := changed(begun(out), settings):
        refuse_strangers(out)
        raise DataError(f"{out} exists with other settings ({', '.join(different)}); give --fresh to replace it")
    print(f"already prepared: {describe(out)}")
    return None


def complete(out: Path) -> bool:
    """Whether the unfinished folder lacks nothing but its name; it then gets it."""
    folder = aside(out)
    if not (folder / MANIFEST).exists():
        return False
    with locked(folder):
        settle(folder, out)
    return True


def prepare(args: argparse.Namespace, job: Job) -> None:
    """Do a job, continue it, or find that it is done already."""
    out = target(args, job.name)
    settings = job.settings | {"tokenizer": args.tokenizer, "shard_tokens": args.shard_tokens}
    before = standing(out, settings, args.fresh)
    if before is None:
        return
    if not complete(out):
        source, split, facts = job.open(before)
        recipe = Recipe(args.tokenizer, args.ranks, settings["eot"], split, args.shard_tokens, args.workers)
        build(out, source, settings | facts, recipe)
    print(f"prepared {describe(out)}")


def prepare_ready(args: argparse.Namespace) -> None:
    """Fetch ready-made shards, or index those that the user has."""
    if args.source:
        pretokenized.index_in_place(args.source)
        print(f"indexed {describe(args.source)}")
        return
    name, ready = ready_shards(args)
    out = target(args, name)
    settings = {"name": "pretokenized", "repo": ready.repo, "pattern": ready.pattern}
    settings |= {"asked_revision": args.revision or "main", "shards": args.shards}
    before = standing(out, settings, args.fresh)
    if before is None:
        return
    if not complete(out):
        pretokenized.fetch(out, settings, before)
    print(f"prepared {describe(out)}")


if __name__ == "__main__":
    main()
