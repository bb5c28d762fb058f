"""Generates text from a checkpoint: python -m eval.sample runs/NAME --prompt "Return the"

Reads a run folder (its newest undamaged checkpoint), a checkpoint folder, a Hugging Face folder, a .pt file, or one
of OpenAI's models by its name (gpt2, gpt2-medium, gpt2-large, gpt2-xl).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from eval.command import model_parser
from model import GPT, KVCache
from runtime.command import at_least, one_line
from runtime.distributed import resolve_device
from runtime.errors import UserError
from weights import open_trained


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one id (1, 1) from logits (1, V). temperature 0 takes the most likely; top_k 0 and top_p 1 keep all."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the more likely ids alone have the probability top_p
        logits = logits.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eot: int | None = None,
) -> Iterator[int]:
    """Yield up to max_tokens new ids after a non-empty prompt; stop at the id `eot`.

    Keys and values are cached. When the context is full, the cache is rebuilt from the newer half of the context:
    the position embeddings are absolute, so cached positions cannot shift.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    ids, cache = prompt[-block_size:], KVCache()
    unread = ids
    for _ in range(max_tokens):
        if len(cache) + len(unread) > block_size:
            unread, cache = ids[-max(1, block_size // 2) :], KVCache()
        hidden = model.hidden(torch.tensor([unread], device=device), cache)
        chosen = int(choose(model.logits(hidden[:, -1]), temperature, top_k, top_p, generator))
        if chosen == eot:
            return
        yield chosen
        unread = [chosen]
        ids = (ids + unread)[-block_size:]


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.sample", "Generate text from a checkpoint.")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder, Hugging Face folder, .pt file, or gpt2")
    parser.add_argument("--prompt", default="", help="text to continue; empty: start of a document")
    parser.add_argument("--samples", type=at_least(0), default=1, help="number of texts")
    parser.add_argument("--max_tokens", type=at_least(0), default=500, help="length of each, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top_k", type=at_least(0), default=0, help="draw from the k most likely tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the most likely tokens up to this sum")
    parser.add_argument("--seed", type=at_least(0, 2**62 - 1), default=1, help="random seed of sampling")
    args = parser.parse_args(argv)
    with one_line("eval.sample"):
        if not (args.temperature == 0 or 1e-3 <= args.temperature < 1e3):
            raise UserError(f"--temperature {args.temperature}: must be 0 or between 0.001 and 1000")
        if not 0 < args.top_p <= 1:
            raise UserError(f"--top_p {args.top_p}: must be above 0 and at most 1")
        device = resolve_device(args.device)
        trained = open_trained(args.checkpoint, device, args.tokenizer, args.ranks, args.eot)
        tokenizer = trained.tokenizer
        assert tokenizer is not None
        prompt = [tokenizer.eot, *tokenizer.encode(args.prompt)]
        settings = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, eot=tokenizer.stop)
        for i in range(args.samples):
            ids = generate(trained.model, prompt, args.max_tokens, seed=args.seed + i, **settings)
            print(args.prompt + tokenizer.decode(list(ids)))
            print("-" * 40)


if __name__ == "__main__":
    main()
