"""A small fixed set of HellaSwag items that training can score on its way, by the harness's rules.

Of each item the ending with the highest log-likelihood per character is taken: the harness's acc_norm.
"""

import json
import math
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.shards import DataError
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """A context and its endings as token ids, the endings' lengths in characters, and the right one's number."""

    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    right: int


def plain(text: str) -> str:
    """HellaSwag's text without the marks its WikiHow part carries in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_items(path: str, count: int, tokenizer: Tokenizer) -> list[Item]:
    """At most `count` items of a file of HellaSwag rows, one JSON object a line.

    The draw and its order are random but always the same, so that the first of them stand for the file, too.
    Raises DataError, naming the file and the line, for a row that is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.choices={path}: cannot be read ({error})") from None
    lines, items = text.rstrip("\n").split("\n") if text.strip() else [], []
    for number in random.Random(0).sample(range(len(lines)), min(count, len(lines))):
        try:
            row = json.loads(lines[number])
            query = plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
            endings, right = [plain(e) for e in row["endings"]], int(row["label"])
            endings[right]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"data.choices={path}: line {number + 1} is no HellaSwag row ({reason})") from None
        context = tokenizer.encode(query)
        whole = [tokenizer.encode(f"{query} {e}") for e in endings]  # tokens may join across the border: cut after
        items.append(Item(context, [w[len(context) :] for w in whole], [len(e) for e in endings], right))
    if not items:
        raise DataError(f"data.choices={path}: holds no rows")
    return items


@torch.no_grad()
def count_right(model: nn.Module, items: Iterable[Item], device: torch.device, seconds: float = math.inf) -> Tensor:
    """Right answers and items scored (2,) float64; no item is begun after `seconds`.

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
