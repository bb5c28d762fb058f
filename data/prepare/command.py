"""Turn text into a folder of token shards, and check such folders.

    python -m data.prepare pydocs                               prose of the installed packages, no download
    python -m data.prepare text --root ~/books --glob '**/*.{txt,md}' --tokenizer gpt2
    python -m data.prepare openwebtext                          9 billion tokens
    python -m data.prepare fineweb_edu --sample 100BT
    python -m data.prepare openwebtext --source ~/owt           parquet, JSON lines or text you have
    python -m data.prepare pretokenized fineweb_edu_10B         ready-made token shards
    python -m data.prepare verify FOLDER
    python -m data.prepare info FOLDER config/gpt2_small.py [--key=value ...]

The folder appears when it is complete. To continue an interrupted command, give it again.
"""

import argparse
from pathlib import Path

from data.prepare import pretokenized
from data.prepare.build import build
from data.prepare.corpora import CORPORA, PLANS, PRETOKENIZED, pretokenized_settings
from data.prepare.formats import NO_ROOM
from data.prepare.output import is_interrupted, is_prepared, locked, unfinished
from data.prepare.text import GLOB
from data.prepare.verify import describe, info, verify
from data.prepare.workers import ShardSettings
from data.shards import DataError, open_dataset
from data.tokenizer import get_tokenizer
from runtime.command import Parser, at_least, join_values, one_line, parse_number

MOST_IDS = 1 << 16  # tokens in shards are uint16


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="data.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pydocs = commands.add_parser("pydocs", help="prose of the installed Python packages: needs no download")
    text = commands.add_parser("text", help="your own files: UTF-8 text, JSON lines or parquet")
    text.add_argument("--root", type=Path, required=True, help="folder to search, or a single file")
    text.add_argument("--glob", action="append", help=f"which files in it (default: {GLOB}); several add up")
    for p in (pydocs, text):
        p.add_argument("--val_fraction", type=float, default=0.05, help="fraction of documents for validation")
        p.set_defaults(tokenizer="byte")
    corpora = []
    for name, corpus in CORPORA.items():
        p = commands.add_parser(name, help=f"{corpus.repo} from the Hugging Face hub")
        p.set_defaults(tokenizer="gpt2", sample=corpus.samples[0])
        if len(corpus.samples) > 1:
            p.add_argument("--sample", choices=corpus.samples, help="which sample")
        p.add_argument("--source", type=Path, help="read parquet, .jsonl or .txt (also .gz, .zst) files from here")
        p.add_argument("--repo", default=corpus.repo, help="dataset repository")
        p.add_argument("--pattern", help="which of its files")
        p.add_argument("--revision", help="commit, tag or branch (default: a fixed commit; for another --repo, main)")
        corpora.append(p)
    for p in (text, *corpora):
        p.add_argument("--column", default="text", help="column or key of the text, in parquet and JSON lines")
    ready = commands.add_parser("pretokenized", help="GPT-2 token shards that others made")
    ready.add_argument("which", nargs="?", help=", ".join(PRETOKENIZED))
    ready.add_argument("--source", type=Path, help="index this folder of shards in place")
    ready.add_argument("--repo", help="any other repository with such shards")
    ready.add_argument("--pattern", help="which files in it")
    ready.add_argument("--revision", help="commit, tag or branch (default: main)")
    ready.add_argument("--shards", type=at_least(1, 2**31), help="only this many training shards")
    for p in (pydocs, text, *corpora, ready):
        kinds = "byte, gpt2, a tokenizer.json or a character map in JSON"
        p.add_argument("--tokenizer", help=f"{kinds}; of shards with --source, too")
        p.add_argument("--eot", help="token of a tokenizer file that separates documents, if it is not found by itself")
    ready.set_defaults(tokenizer="gpt2")
    for p in (pydocs, text, *corpora):
        p.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
        p.add_argument("--shard_tokens", type=at_least(1, 2**31 - 1), default=100_000_000, help="tokens per shard")
        p.add_argument("--workers", type=at_least(1, 4096), help="processes (default: one per core)")
        skipped = "stop when over 100 documents, and over this fraction, cannot be read"
        p.add_argument("--max_skipped", type=float, default=0.1, help=skipped)
    for p in (text, *corpora):
        p.add_argument("--exclude", action="append", default=[], help="leave out files or folders of this name or glob")
    for p in (pydocs, text, *corpora, ready):
        p.add_argument("--out", type=Path, help="dataset folder (default: data/tokens/NAME)")
        p.add_argument("--fresh", action="store_true", help="start over, and replace a finished folder")
    commands.add_parser("verify", help="check a folder").add_argument("folder", type=Path)
    facts = commands.add_parser("info", help="describe a folder")
    facts.add_argument("folder", type=Path)
    facts.add_argument("config", nargs="?", help="config file of a run, to show its epochs; --key=value may follow")
    facts.add_argument("--budget", type=parse_number, help="training tokens, to show how many epochs they are")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "config", None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    again = "the same command" + (", without --fresh," if getattr(args, "fresh", False) else "")
    with one_line("data.prepare", f"interrupted; {again} continues", memory="use fewer --workers"):
        if args.command == "verify":
            print(verify(args.folder))
        elif args.command == "info":
            print(info(args.folder, args.budget))
            if args.config:
                print(coverage(args.folder, args.config, rest))
        elif args.command == "pretokenized" and args.source:
            pretokenized.index_in_place(args.source, args.tokenizer, args.eot)
            print(f"indexed {describe(args.source)}")
        else:
            try:
                prepare(args)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise DataError(f"{error}; make room there, the same command continues") from None


def prepare(args: argparse.Namespace) -> None:
    """Make or continue a dataset, unless it is complete already."""
    check(args)
    if args.command == "pretokenized":
        if (args.tokenizer, args.eot) != ("gpt2", None):
            raise DataError("--tokenizer and --eot: describe your own shards; name their folder with --source")
        name, settings = pretokenized_settings(args)
    else:
        plan = PLANS[args.command](args)
        name, settings = plan.name, plan.settings | tokenizer_settings(args) | {"shard_tokens": args.shard_tokens}
    out = args.out or Path("data/tokens", name)
    out = out.resolve() if out.name in ("", "..") or out.is_symlink() else out
    if not out.name or out.is_mount():
        raise DataError(f"--out {out}: give the name of a folder to be made")
    if not args.fresh and not is_interrupted(out) and is_prepared(out, settings):
        return
    with locked(out):
        pinned = unfinished(out, settings, args.fresh)
        if pinned is None:
            return
        if args.command == "pretokenized":
            pretokenized.fetch(out, settings, pinned)
        else:
            source, split, facts = plan.open(pinned)
            how, workers = (args.tokenizer, args.ranks, settings["eot"]), args.workers or default_workers()
            shards = ShardSettings(*how, split, args.shard_tokens, workers, args.eot, args.max_skipped)
            build(out, source, settings | facts, shards)
    print(f"prepared {describe(out)}")


def default_workers() -> int:
    """The number of cores that this process may use, for one worker on each."""
    from runtime.hardware import cores  # imports torch, which takes a second and is not needed otherwise

    return cores()


def tokenizer_settings(args: argparse.Namespace) -> dict:
    """The tokenizer's part of a preparation's settings. DataError for a file with ids that shards cannot hold."""
    if args.tokenizer in ("byte", "gpt2") and args.eot is None:
        return {"tokenizer": args.tokenizer}
    tokenizer = get_tokenizer(args.tokenizer, eot=args.eot)
    if tokenizer.vocab_size > MOST_IDS:
        ids = f"{tokenizer.vocab_size:,} ids, and shards hold at most {MOST_IDS:,}"
        raise DataError(f"--tokenizer {args.tokenizer}: {ids}; choose a smaller one")
    return {"tokenizer": tokenizer.name, **({"separator": args.eot} if args.eot is not None else {})}


def check(args: argparse.Namespace) -> None:
    """Check the numeric options. Raises DataError for one that is out of range."""
    if not 0 < getattr(args, "val_fraction", 0.5) < 1:
        raise DataError(f"--val_fraction {args.val_fraction}: must be between 0 and 1")
    if not 0 <= getattr(args, "max_skipped", 0.5) <= 1:
        raise DataError(f"--max_skipped {args.max_skipped}: must be from 0 to 1")


def coverage(folder: Path, config: str, overrides: list[str]) -> str:
    """How much of a folder the run of a config file reads. Raises the errors that the trainer would raise."""
    from config.load import load_config
    from data.loader import TrainLoader, ValidationSet

    flag = "--as_published"
    changes = [o for o in join_values(overrides, [flag]) if o != flag]
    run = load_config(config, [*changes, f"--data.path={folder}"], flag in overrides)
    dataset = open_dataset(folder, run.model.vocab_size)
    sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
    train = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes)
    val = ValidationSet(dataset, run.data, micro_batch=1, **sizes)  # to count its windows
    budget = f"{run.total_steps:,} steps = {run.total_steps * run.tokens_per_step:,} tokens"
    return (
        f"  {'epochs':15} {train.epochs(run.total_steps * run.sequences):.2f} with {run.size}: {budget}\n"
        f"  {'validation':15} {val.count:,} of {len(val.windows):,} windows of {run.model.block_size:,} tokens"
    )
