"""Loss over a whole validation split or any text: python -m eval.perplexity runs/A runs/B

Several models are compared on the same windows, with a confidence interval of the paired difference. Losses vary
much more between windows than between optimizers, and this variation cancels in the difference. Under torchrun all
ranks share the work.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.shards import open_dataset
from eval.command import model_parser
from eval.scoring import Scorer
from runtime.command import at_least, one_line
from runtime.distributed import World, start_world
from runtime.errors import UserError
from runtime.files import write_json
from weights import Trained, open_trained

CHUNK = 256  # windows per rank that the scorer gets at a time
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def spans(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (begin, end, scored) over a stream: the inputs are [begin, end), the last `scored` targets count.

    Every token but the first is a target that counts once. With stride < context, every target after the first
    window has at least context - stride earlier tokens in its window.
    """
    done = 0
    for begin in range(0, tokens - 1, stride):
        end = min(begin + context, tokens - 1)
        yield begin, end, end - done
        done = end
        if end == tokens - 1:
            return


@dataclass
class Stream:
    """Token arrays that are read one after another, and the UTF-8 bytes per token if known."""

    name: str
    parts: Sequence[np.ndarray]
    bytes_per_token: float | None


def read_split(folder: str, split: str, vocab_size: int) -> Stream:
    """A split of a dataset, memory-mapped. Raises UserError if it cannot be used."""
    dataset = open_dataset(folder, vocab_size)
    parts = [np.memmap(s.path, dtype="<u2", mode="r", offset=s.start, shape=(s.tokens,)) for s in dataset.splits[split]]
    return Stream(f"{folder}, {split} split", parts, dataset.bytes_per_token(split))


def read_text(files: list[str], trained: Trained) -> Stream:
    """Text files as token arrays that start with an end-of-text token. Raises UserError for one that is not UTF-8."""
    parts, size = [], 0
    for file in files:
        try:
            text = Path(file).read_bytes().decode("utf-8-sig")  # line ends as they are, no byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
        size += len(text.encode())
        assert trained.tokenizer is not None
        parts.append(np.array([trained.tokenizer.eot, *trained.tokenizer.encode(text)], dtype=np.uint32))
    return Stream(", ".join(files), parts, size / max(1, sum(len(p) - 1 for p in parts)))


def window_losses(scorer: Scorer, stream: Stream, context: int, stride: int) -> np.ndarray:
    """Loss sum (nats) and number of targets of every window, (windows, 2), the same on every rank."""
    windows = [(part, span) for part in stream.parts for span in spans(len(part), context, stride)]
    if not windows:
        raise UserError(f"{stream.name}: nothing to score")
    sums, chunk = [], CHUNK * scorer.world.size
    with tqdm(total=len(windows), unit="window", disable=not (scorer.world.is_main and sys.stderr.isatty())) as bar:
        for first in range(0, len(windows), chunk):
            pairs = []
            for part, (begin, end, scored) in windows[first : first + chunk]:
                ids = part[begin : end + 1].tolist()
                pairs.append((ids[:-scored], ids[-scored:]))
            for (logp, _), (_, targets) in zip(scorer.loglikelihoods(pairs), pairs, strict=True):
                sums.append((-logp, len(targets)))
            bar.update(len(pairs))
    return np.array(sums, dtype=np.float64)


def mean_and_error(values: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """sum(values) / sum(counts) and its standard error for independent windows; no error for fewer than two.

    The error is that of a ratio of sums to first order, from the residuals values - mean * counts.
    """
    n, total = len(values), counts.sum()
    mean = values.sum() / total
    if n < 2:
        return float(mean), None
    residuals = values - mean * counts
    return float(mean), float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / total)


def paired(a: np.ndarray, b: np.ndarray) -> dict:
    """Loss of b minus loss of a, nats per token, from window sums (windows, 2), with a 95 % interval."""
    assert (a[:, 1] == b[:, 1]).all()
    difference, error = mean_and_error(b[:, 0] - a[:, 0], a[:, 1])
    interval = None if error is None else [difference - Z95 * error, difference + Z95 * error]
    return {"difference": difference, "stderr": error, "interval95": interval}


def open_models(args: argparse.Namespace) -> list[Trained]:
    """The models, on the CPU, each with its own name. UserError if their tokenizers differ."""
    models: list[Trained] = []
    for path in args.models:
        named = (args.tokenizer, args.ranks, args.eot)
        trained = open_trained(path, torch.device("cpu"), *named, "required" if args.text else "unused")
        if any(m.name == trained.name and m.path != trained.path for m in models):
            trained.name = path
        models.append(trained)
        a, b = models[0].facts, trained.facts
        if (a["name"], a["vocab_size"]) != (b["name"], b["vocab_size"]):
            raise UserError(
                f"{models[0].name} reads {a['name']} tokens, {trained.name} {b['name']} tokens: "
                "their losses per token cannot be compared"
            )
    return models


def read_stream(args: argparse.Namespace, first: Trained) -> Stream:
    """The text or dataset to score; by default the dataset of the first model."""
    if args.text:
        return read_text(args.text, first)
    folder = args.data or (first.state["config"]["data"]["path"] if first.kind == "checkpoint" else None)
    if folder is None:
        raise UserError(f"{first.path} does not say what it was trained on; give --data FOLDER or --text FILE")
    return read_split(folder, args.split, first.model.config.vocab_size)


def compare(args: argparse.Namespace, world: World) -> dict:
    """Loss of every model, and the paired difference of each to the first."""
    models = open_models(args)
    stream = read_stream(args, models[0])
    context = min(m.model.config.block_size for m in models)
    stride = args.stride or context
    if stride > context:
        raise UserError(f"--stride {stride}: must be at most the context, {context}")
    report: dict[str, Any] = {
        "format": 1,
        "text": stream.name,
        "context": context,
        "stride": stride,
        "models": [],
        "paired": [],
    }
    sums = []
    for trained in models:  # one model at a time on the device
        scorer = Scorer(trained.model.to(world.device), args.batch_tokens, world)
        sums.append(window_losses(scorer, stream, context, stride))
        trained.model.to("cpu")
        loss, error = mean_and_error(sums[-1][:, 0], sums[-1][:, 1])
        row: dict[str, Any] = {"name": trained.name, "path": str(trained.path), "sha256": trained.sha256}
        row |= {"step": trained.state.get("step"), "tokens": trained.state.get("tokens"), "loss": loss}
        row |= {"stderr": error, "windows": len(sums[-1]), "targets": int(sums[-1][:, 1].sum())}
        if stream.bytes_per_token:
            row["bits_per_byte"] = loss / stream.bytes_per_token / math.log(2)
        report["models"].append(row)
        if world.is_main:
            print(describe(row), flush=True)
    for trained, other in zip(models[1:], sums[1:], strict=True):
        pair = {"a": models[0].name, "b": trained.name, **paired(sums[0], other)}
        report["paired"].append(pair)
        if world.is_main:
            print(describe_pair(pair), flush=True)
    return report


def describe(row: dict) -> str:
    """A model's loss in one line."""
    error = "" if row["stderr"] is None else f" +- {row['stderr']:.4f}"
    bits = f", {row['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in row else ""
    return (
        f"{row['name']}  loss {row['loss']:.4f}{error} nats/token, perplexity {math.exp(row['loss']):.2f}{bits}  "
        f"({row['targets']:,} tokens in {row['windows']:,} windows)"
    )


def describe_pair(row: dict) -> str:
    """The paired difference of two models in one line."""
    text = f"{row['b']} - {row['a']}  {row['difference']:+.4f} nats/token"
    if row["interval95"] is None:
        return f"{text}, one window: no interval"
    low, high = row["interval95"]
    verdict = "indistinguishable" if low <= 0 <= high else f"{row['b' if high < 0 else 'a']} is better"
    return f"{text}, 95 % interval {low:+.4f} to {high:+.4f}: {verdict}"


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.perplexity", "Loss over a split or a text.")
    parser.add_argument("models", nargs="+", help="runs, checkpoints, Hugging Face folders, .pt files, gpt2")
    parser.add_argument("--data", help="dataset folder; default: that of the first model")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--text", nargs="+", help="text files to score instead of a dataset")
    parser.add_argument("--stride", type=at_least(1), help="tokens between window starts; default: the whole context")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--batch_tokens", type=at_least(1), help="tokens per forward pass; halved if memory is short")
    args = parser.parse_args(argv)
    with one_line("eval.perplexity"), start_world(args.device) as world:
        torch.set_float32_matmul_precision("highest")
        if args.out and world.is_main:  # before the work, so that a wrong path does not lose it
            args.out.parent.mkdir(parents=True, exist_ok=True)
        report = compare(args, world)
        if args.out and world.is_main:
            write_json(args.out, report)


if __name__ == "__main__":
    main()
