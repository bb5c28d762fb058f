"""Log-likelihoods of continuations and most likely continuations, and the model of lm-eval that is built on them."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model import GPT, KVCache
from runtime.command import is_out_of_memory
from runtime.distributed import ALONE, World
from runtime.errors import UserError

NEW_TOKENS = 256  # lm-eval's limit for tasks without their own
POSITIONS = 4096  # logits are computed for this many positions at a time: 0.8 GB in float32 at GPT-2's vocabulary

Score = tuple[float, bool]  # log-likelihood in nats; whether every token is the most likely one
Group = tuple[tuple[int, ...], list[tuple[int, list[int]]]]  # input ids; number and target ids of each request
Item = TypeVar("Item")


@torch.inference_mode()
def greedy(
    model: GPT, prompts: Sequence[list[int]], max_tokens: int, ends: Callable[[list[int]], bool] = lambda ids: False
) -> list[list[int]]:
    """The most likely ids after each prompt, at most max_tokens, until `ends` is true of a prompt's new ids.

    Prompts may differ in length; the longest one and max_tokens fit in the context together. The model's keys and
    values are cached.
    """
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device)
    cache = KVCache(torch.tensor(padding, device=device) if any(padding) else None)
    out: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for _ in range(max_tokens):
        ids = model.logits(model.hidden(ids, cache)[:, -1]).argmax(-1, keepdim=True)
        new = ids[:, 0].tolist()
        for row in list(unfinished):
            out[row].append(new[row])
            if ends(out[row]):
                unfinished.remove(row)
        if not unfinished:
            break
    return out


class Scorer:
    """Scores (context, continuation) pairs of token ids, the longest first. Equal inputs are computed once.

    batch_tokens: tokens of a forward pass, padding included; by default 131,072 on a GPU and 8,192 on a CPU.
    If a batch does not fit in memory, the number is halved from then on and the batch is repeated.
    world: the ranks that share the work. Each is given the same pairs and gets all scores.
    """

    def __init__(self, model: GPT, batch_tokens: int | None = None, world: World = ALONE) -> None:
        self.model, self.block_size, self.world = model.eval(), model.config.block_size, world
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or (131_072 if self.device.type == "cuda" else 8192)
        self.scored = 0  # requests
        self.truncated = 0  # requests that were longer than the context and lost tokens on the left

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], progress: bool = False) -> list[Score]:
        """log p(continuation | context) of each pair, and whether every token of it is the most likely one.

        A pair may have as many tokens as the context plus one; a longer one loses tokens on the left, as in lm-eval.
        A pair needs at least one token of context. An empty continuation has probability 1.
        Raises UserError on every rank if a single sequence does not fit in the memory of one rank.
        """
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            assert context, "no context: give the end-of-text token"
            ids = context + continuation
            self.truncated += len(ids) > self.block_size + 1
            ids = ids[-(self.block_size + 1) :]
            target = ids[-min(len(continuation), len(ids) - 1) :]
            groups.setdefault(tuple(ids[:-1]), []).append((number, target))
        self.scored += len(pairs)
        found = self._share(list(groups.items()), lambda group: len(group[0]), self._score, progress)
        return [found.get(number, (0.0, True)) for number in range(len(pairs))]

    def continuations(
        self, prompts: Sequence[list[int]], max_tokens: int, ends: Callable[[list[int]], bool], progress: bool = False
    ) -> list[list[int]]:
        """The most likely ids after each prompt, as `greedy` finds them. All prompts share the ranks and batches.

        A prompt that leaves no room for max_tokens in the context loses tokens on the left, as in lm-eval.
        Raises UserError on every rank if there is no room for a prompt at all, or too little memory for one.
        """
        room = self.block_size - max_tokens
        if room < 1:
            raise UserError(f"{max_tokens} new tokens and a prompt do not fit in the context of {self.block_size}")
        self.truncated += sum(len(prompt) > room for prompt in prompts)
        self.scored += len(prompts)

        def compute(batch: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
            new = greedy(self.model, [prompt for _, prompt in batch], max_tokens, ends)
            return {number: ids for (number, _), ids in zip(batch, new, strict=True)}

        todo = [(number, prompt[-room:]) for number, prompt in enumerate(prompts)]
        found = self._share(todo, lambda item: len(item[1]) + max_tokens, compute, progress)
        return [found[number] for number in range(len(prompts))]

    def _share(
        self, todo: list[Item], length: Callable[[Item], int], compute: Callable[[list[Item]], dict], progress: bool
    ) -> dict:
        """What compute(batch) returns for all batches, on all ranks, by request number. UserError if memory is short.

        length: tokens of an item in a batch.
        """
        todo = sorted(todo, key=lambda item: -length(item))  # the largest batch comes first
        found, problem = {}, None
        try:
            found = self._in_batches(todo[self.world.rank :: self.world.size], length, compute, progress)
        except MemoryError as error:
            problem = str(error)
        gathered = self.world.gather((found, problem))
        if problem := next((p for _, p in gathered if p), None):
            raise UserError(problem)
        return {number: result for part, _ in gathered for number, result in part.items()}

    def _in_batches(
        self, todo: list[Item], length: Callable[[Item], int], compute: Callable[[list[Item]], dict], progress: bool
    ) -> dict:
        """This rank's part of `_share`. MemoryError if a batch of one item does not fit."""
        out: dict = {}
        with tqdm(total=len(todo), unit="input", disable=not (progress and sys.stderr.isatty())) as bar:
            while todo:
                longest = length(todo[0])
                batch, scores = todo[: max(1, self.batch_tokens // longest)], None
                try:
                    scores = compute(batch)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                if scores is None:  # not in the `except` block, where the error keeps the batch's memory in use
                    self._use_smaller_batches(len(batch), longest)
                    continue
                todo = todo[len(batch) :]
                out |= scores
                bar.update(len(batch))
        return out

    def _use_smaller_batches(self, sequences: int, length: int) -> None:
        if sequences == 1:
            hint = "" if self.device.type == "cpu" else "; use --device cpu"
            raise MemoryError(f"out of memory with one sequence of {length} tokens{hint}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = sequences // 2 * length
        print(f"out of memory: continuing with {self.batch_tokens} tokens per batch", file=sys.stderr)

    @torch.inference_mode()
    def _score(self, batch: list[Group]) -> dict[int, Score]:
        """The scores of one batch, whose first input is the longest, by request number."""
        ids = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        lengths: dict[int, int] = {}
        for row, (tokens, requests) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)  # padding on the right: causal attention never reads it
            for number, target in requests:
                rows += [row] * len(target)
                columns += range(len(tokens) - len(target), len(tokens))
                targets += target
                lengths[number] = len(target)
        hidden = self.model.hidden(ids.to(self.device))
        hidden = hidden[torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device)]
        logp, likeliest = self._token_scores(hidden, torch.tensor(targets, device=self.device))
        parts = zip(logp.split(list(lengths.values())), likeliest.split(list(lengths.values())), strict=True)
        return {number: (p.sum().item(), bool(ok.all())) for number, (p, ok) in zip(lengths, parts, strict=True)}

    def _token_scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For hidden states (N, C) and targets (N,): log p (N,) float64, and whether the target is the argmax (N,)."""
        logp, likeliest = [], []
        for h, target in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True):
            logits = self.model.logits(h).float()
            likeliest.append((logits.argmax(-1) == target).cpu())
            logp.append(-F.cross_entropy(logits, target, reduction="none").double().cpu())
        return torch.cat(logp), torch.cat(likeliest)


def harness_model(scorer: Scorer, tokenizer: Tokenizer) -> Any:
    """The scorer as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        eot_token_id = tokenizer.eot  # lm-eval also puts it before a text that has no context
        max_length = scorer.block_size
        tokenizer_name = tokenizer.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **options: object) -> list:
            return scorer.loglikelihoods([(c, k) for _, c, k in requests], progress=not disable_tqdm)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihoods of whole texts, in windows that do not overlap; each has one token of context."""
            pairs: list[tuple] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                ids = tokenizer.encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
                pairs += map(make_disjoint_window, windows)
                owners += [number] * (len(pairs) - len(owners))
            out = [0.0] * len(requests)
            for number, (logp, _) in zip(owners, scorer.loglikelihoods(pairs, not disable_tqdm), strict=True):
                out[number] += logp
            return out

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            """The most likely continuations, up to a stop string, end-of-text or the task's number of tokens."""
            out = [""] * len(requests)
            groups: dict[str, list[int]] = {}  # requests with equal settings
            for number, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
            for settings, numbers in groups.items():
                asked = normalize_gen_kwargs(json.loads(settings), NEW_TOKENS)
                if asked["do_sample"]:
                    raise UserError("the task draws its texts at random; only tasks with do_sample: false can be run")
                stops = [text for text in asked["until"] if text]
                prompts = [tokenizer.encode(requests[n].args[0]) or [tokenizer.eot] for n in numbers]
                ends = partial(self._ends, stops)
                new = scorer.continuations(prompts, asked["max_gen_toks"], ends, progress=not disable_tqdm)
                for number, ids in zip(numbers, new, strict=True):
                    text = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.stop else ids)
                    out[number] = min((text.split(stop)[0] for stop in stops), key=len, default=text)
            return out

        def _ends(self, stops: list[str], ids: list[int]) -> bool:
            if ids[-1] == tokenizer.stop:
                return True
            text = tokenizer.decode(ids)
            return any(stop in text for stop in stops)

    return HarnessModel()
