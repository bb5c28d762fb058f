"""A small fixed set of HellaSwag items, scored during training by the rules of lm-eval.

The model answers an item with the ending that has the highest log-likelihood (acc), or the highest one per character
(acc_norm).
"""

import json
import random
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import DataConfig
from data.shards import DataError, Dataset
from data.tokenizer import Tokenizer, tokenizer_of
from runtime.distributed import World


@dataclass(frozen=True)
class Item:
    """A context and its endings as token ids, the lengths of the endings in characters, and the right ending."""

    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    right: int


def plain(text: str) -> str:
    """HellaSwag's text without the marks in brackets that its WikiHow part has."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_items(path: str, count: int, tokenizer: Tokenizer) -> list[Item]:
    """At most `count` items of a file of HellaSwag rows, one JSON object per line.

    The items come in a fixed random order, so that the first few represent the whole file.
    Raises DataError, which names the file and the line, for a line that is not such a row.
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
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"data.hellaswag={path}: line {number + 1} is not a HellaSwag row ({reason})") from None
        context = tokenizer.encode(query)
        whole = [tokenizer.encode(f"{query} {e}") for e in endings]  # cut after encoding, as lm-eval does
        items.append(Item(context, [w[len(context) :] for w in whole], [len(e) for e in endings], right))
    if not items:
        raise DataError(f"data.hellaswag={path}: holds no rows")
    return items


class HellaSwag:
    """Items that all ranks score together. Every rank holds all of them."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    @classmethod
    def of_run(cls, config: DataConfig, dataset: Dataset) -> "HellaSwag":
        """The items that a run scores, in the tokens of its dataset. Raises DataError for a file of other content."""
        if dataset.tokenizer is None:
            raise DataError(f"data.hellaswag={config.hellaswag}: {dataset.folder} names no tokenizer to read it with")
        tokenizer = tokenizer_of(dataset.tokenizer, (dataset.folder,))
        return cls(read_items(config.hellaswag, config.hellaswag_items, tokenizer))

    def score(self, model: nn.Module, world: World, autocast: AbstractContextManager) -> dict[str, float | int]:
        """Metrics of a model. Every rank calls this; each item is scored on one rank."""
        model.eval()
        with autocast:
            right = count_right(model, self.items[world.rank :: world.size], world.device)
        model.train()
        acc_norm, acc = (world.sum(right) / len(self.items)).tolist()
        return dict(hellaswag_acc_norm=acc_norm, hellaswag_acc=acc, hellaswag_items=len(self.items))


@torch.no_grad()
def count_right(model: Any, items: Iterable[Item], device: torch.device) -> Tensor:
    """Number of right answers (2,) float64: by log-likelihood per character, and by log-likelihood.

    The model needs hidden, logits and config.block_size, as GPT has.
    """
    right, longest = torch.zeros(2, dtype=torch.float64), model.config.block_size + 1
    for item in items:
        rows = [torch.tensor((item.context + ending)[-longest:]) for ending in item.endings]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logp = model.logits(model.hidden(ids[:, :-1])).float().log_softmax(-1)
        logp = logp.gather(-1, ids[:, 1:, None])[..., 0].cpu()
        sums, lengths = [], []
        for row, ending, characters, values in zip(rows, item.endings, item.characters, logp, strict=True):
            last = len(row) - 1
            sums.append(values[last - min(len(ending), last) : last].sum().item())
            lengths.append(max(1, characters))
        by_length = [x / n for x, n in zip(sums, lengths, strict=True)]
        right += torch.tensor([scores.index(max(scores)) == item.right for scores in (by_length, sums)])
    return right.to(device)
