"""Generation of text with and without the cache of keys and values, in turns, greedy, on one thread.

python -m bench.generation              512 new tokens of a model of 4 layers x 256, minutes
python -m bench.generation --smoke      16 new tokens of a tiny model, seconds
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.report import Report, bench_parser, interleaved, results_folder
from bench.timing import TINY
from eval.scoring import greedy
from model import GPT, GPTConfig
from runtime.command import one_line

PROMPT = [1, 2, 3, 4]


@torch.inference_mode()
def without_cache(model: GPT, tokens: int) -> list[int]:
    """The same ids as `greedy` finds, from a forward pass over the whole text for each of them."""
    ids = list(PROMPT)
    for _ in range(tokens):
        hidden = model.hidden(torch.tensor([ids]))
        ids.append(int(model.logits(hidden[:, -1]).argmax()))
    return ids[len(PROMPT) :]


@one_line("bench.generation")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("generation", __doc__)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, rounds = (16, 1) if args.smoke else (512, 1)
    model = GPT(TINY if args.smoke else GPTConfig(n_layer=4, n_head=4, n_embd=256)).eval()
    assert greedy(model, [PROMPT], tokens) == [without_cache(model, tokens)]
    sides: dict[str, Callable[[], Any]] = {
        "cache": partial(greedy, model, [PROMPT], tokens),
        "no cache": partial(without_cache, model, tokens),
        "cache, 8 prompts in a batch": partial(greedy, model, [PROMPT] * 8, tokens),
    }
    seconds = interleaved(sides, rounds, warmup=0)
    report = Report("generation", results_folder(args))
    for (name, s), prompts in zip(seconds.items(), (1, 1, 8), strict=True):
        speedup = prompts * seconds["no cache"] / s
        report.add(how=name, new_tokens=tokens * prompts, seconds=s, tokens_per_s=tokens * prompts / s, speedup=speedup)
    report.table()


if __name__ == "__main__":
    main()
