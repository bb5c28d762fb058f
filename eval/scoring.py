"""Log-likelihoods of continuations under our GPT, and the lm-eval model made of them."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model import GPT
from runtime.command import is_out_of_memory
from runtime.distributed import ALONE, World

POSITIONS = 4096  # positions whose logits are held at a time: 0.8 GB in float32 at GPT-2's vocabulary


class Scorer:
    """Scores (context, continuation) pairs of token ids, longest first, equal inputs once.

    batch_tokens: tokens of a forward pass, padding included; None starts high on a GPU and moderate on a CPU.
    When a batch does not fit in memory, the number is halved for good and the batch is done again.
    world: ranks that are given the same pairs and share the work; each gets all scores.
    """

    def __init__(self, model: GPT, batch_tokens: int | None = None, world: World = ALONE) -> None:
        self.model, self.block_size, self.world = model.eval(), model.config.block_size, world
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or (131_072 if self.device.type == "cuda" else 8192)
        self.truncated = 0  # requests that lost tokens on the left, as they were longer than the context
        self.scored = 0  # requests in all

    @torch.inference_mode()
    def loglikelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]], progress: bool = False
    ) -> list[tuple[float, bool]]:
        """For each pair log p(continuation | context) in nats and whether every token of it is the likeliest.

        What is longer than the context plus one target loses tokens on the left, as in the harness.
        A pair needs at least one token of context; an empty continuation has probability 1.
        """
        inputs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            assert context, "no context: give the end-of-text token"
            whole = context + continuation
            self.truncated += len(whole) > self.block_size + 1
            whole = whole[-(self.block_size + 1) :]
            target = whole[-min(len(continuation), len(whole) - 1) :]
            inputs.setdefault(tuple(whole[:-1]), []).append((number, target))
        self.scored += len(pairs)
        todo = sorted(inputs.items(), key=lambda item: -len(item[0]))  # what does not fit in memory shows at once
        scores, problem = [], None
        try:
            scores = self._work_off(todo[self.world.rank :: self.world.size], progress)
        except MemoryError as error:  # all ranks must hear of it
            problem = str(error)
        shares = self.world.gather((scores, problem))
        if problem := next((p for _, p in shares if p), None):
            raise ValueError(problem)
        out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for share, _ in shares:
            for number, score in share:
                out[number] = score
        return out

    def _work_off(self, todo: list, progress: bool) -> list[tuple[int, tuple[float, bool]]]:
        """The scores of inputs, longest first, in batches. MemoryError if not even one of them fits."""
        out = []
        total = sum(len(wanted) for _, wanted in todo)
        with tqdm(total=total, unit="request", disable=not (progress and sys.stderr.isatty())) as bar:
            while todo:
                batch = todo[: max(1, self.batch_tokens // max(1, len(todo[0][0])))]
                scores = self._try(batch)
                if scores is None:
                    continue
                todo = todo[len(batch) :]
                out += scores
                bar.update(len(scores))
        return out

    def _try(self, batch: list) -> list[tuple[int, tuple[float, bool]]] | None:
        """The scores of a batch; None, with half the batch from now on, if it did not fit in memory."""
        try:
            return self._score(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                hint = "" if self.device.type == "cpu" else "; use --device cpu"
                raise MemoryError(f"out of memory with one sequence of {len(batch[0][0])} tokens{hint}") from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, len(batch) // 2) * len(batch[0][0])
        print(f"out of memory: going on with {self.batch_tokens} tokens a batch", file=sys.stderr)
        return None

    def _score(self, batch: list) -> list[tuple[int, tuple[float, bool]]]:
        ids = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
        rows, columns, targets, owners = [], [], [], []
        for row, (tokens, wanted) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)  # padding on the right is never looked at: causal
            for number, target in wanted:
                rows += [row] * len(target)
                columns += range(len(tokens) - len(target), len(tokens))
                targets += target
                owners.append((number, len(target)))
        hidden = self.model.hidden(ids.to(self.device))
        picked = hidden[torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device)]
        logp, likeliest = self._token_scores(picked, torch.tensor(targets, device=self.device))
        out, at = [], 0
        for number, length in owners:
            out.append((number, (logp[at : at + length].sum().item(), bool(likeliest[at : at + length].all()))))
            at += length
        return out

    def _token_scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, C), targets (N,) to log p (N,) float64 and whether the target is the argmax (N,)."""
        logp, likeliest = [], []
        for h, target in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True):
            logits = self.model.logits(h).float()
            likeliest.append((logits.argmax(-1) == target).cpu())
            logp.append(-F.cross_entropy(logits, target, reduction="none").double().cpu())
        return torch.cat(logp), torch.cat(likeliest)


def harness_model(scorer: Scorer, tokenizer: Tokenizer) -> object:
    """The scorer as a model of lm-eval. Raises ImportError, with the remedy, without lm-eval."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise ImportError("benchmark scores need: pip install lm_eval") from None

    class HarnessModel(TemplateLM):
        eot_token_id = tokenizer.eot  # also what stands before a text that has no context
        max_length = scorer.block_size
        tokenizer_name = tokenizer.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **options: object) -> list:
            return scorer.loglikelihoods([(c, k) for _, c, k in requests], progress=not disable_tqdm)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            """Log-likelihoods of whole texts, in windows that do not overlap and a token of context each."""
            pairs, owners = [], []
            for number, request in enumerate(requests):
                ids = tokenizer.encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
                for context, continuation in map(make_disjoint_window, windows):
                    pairs.append((context, continuation))
                    owners.append(number)
            out = [0.0] * len(requests)
            for number, (logp, _) in zip(owners, scorer.loglikelihoods(pairs, not disable_tqdm), strict=True):
                out[number] += logp
            return out

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            raise ValueError("tasks that generate text are not supported; choose tasks scored by likelihood")

    return HarnessModel()
