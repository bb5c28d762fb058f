"""A small fixed set of HellaSwag items, scored during training by the rules of lm-eval.

A model's answer to an item is the ending with the highest log-likelihood per character (acc_norm).
"""

import json
import math
import random
import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.loader import DataConfig
from data.shards import DataError, Dataset
from data.tokenizer import Tokenizer, get_tokenizer
from runtime.distributed import World


@dataclass(frozen=True)
class Item:
    """A context and its endings as token ids, the endings' lengths in characters, and the right one's number."""

    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    right: int


def plain(text: str) -> str:
    """HellaSwag's text without the bracketed marks of its WikiHow part."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_items(path: str, count: int, tokenizer: Tokenizer) -> list[Item]:
    """At most `count` items of a file of HellaSwag rows, one JSON object a line.

    The items are drawn in random order, which is always the same, so the first few represent the whole file.
    Raises DataError, naming the file and the line, for a line that is not such a row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.hellaswag={path}: cannot be read ({error})") from None
    lines, items = text.rstrip("\n").split("\n") if text.strip() else [], []
    for number in random.Random(0).sample(range(len(lines)), min(count, len(lines))):
        try:
            row = json.loads(lines[number])
            query = plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
            endings, right = [plain(e) for e in row["endings"]], int(row["label"])
            endings[right]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"data.hellaswag={path}: line {number + 1} is no HellaSwag row ({reason})") from None
        context = tokenizer.encode(query)
        whole = [tokenizer.encode(f"{query} {e}") for e in endings]  # tokens may join across the border: cut after
        items.append(Item(context, [w[len(context) :] for w in whole], [len(e) for e in endings], right))
    if not items:
        raise DataError(f"data.hellaswag={path}: holds no rows")
    return items


class HellaSwag:
    """Items that every rank holds and that all ranks score together."""

    def __init__(self, items: list[Item], seconds: float = math.inf) -> None:
        self.items, self.seconds = items, seconds

    @classmethod
    def of_run(cls, config: DataConfig, dataset: Dataset) -> "HellaSwag":
        """The items a run scores, in its dataset's tokens. Raises DataError for a file without such rows."""
        tokenizer = get_tokenizer(dataset.manifest.get("tokenizer", {}).get("name", "gpt2"))
        return cls(read_items(config.hellaswag, config.hellaswag_items, tokenizer), config.hellaswag_seconds)

    def score(self, model: nn.Module, world: World, autocast: AbstractContextManager) -> dict[str, float | int]:
        """Metrics of a model, each item scored on one rank. Called by every rank."""
        model.eval()
        with autocast:
            sums = count_right(model, self.items[world.rank :: world.size], world.device, self.seconds)
        model.train()
        right, count = world.sum(sums).tolist()
        return dict(hellaswag_acc_norm=right / count, hellaswag_items=round(count))


@torch.no_grad()
def count_right(model: nn.Module, items: Iterable[Item], device: torch.device, seconds: float = math.inf) -> Tensor:
    """Right answers and scored items, (2,) float64; no item is started after `seconds`.

    The model has hidden, logits and config.block_size, as GPT has.
    """
    right, scored, longest, until = 0, 0, model.config.block_size + 1, time.monotonic() + seconds
    for item in items:
        if time.monotonic() > until:
            break
        rows = [(item.context + ending)[-longest:] for ending in item.endings]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        ids = ids.to(device)
        logp = model.logits(model.hidden(ids[:, :-1])).float().log_softmax(-1)
        logp = logp.gather(-1, ids[:, 1:, None])[..., 0].cpu()
        scores = []
        for tokens, ending, characters, values in zip(rows, item.endings, item.characters, logp, strict=True):
            last = len(tokens) - 1
            scores.append(values[last - min(len(ending), last) : last].sum().item() / max(1, characters))
        right, scored = right + (scores.index(max(scores)) == item.right), scored + 1
    return torch.tensor([right, scored], dtype=torch.float64, device=device)
