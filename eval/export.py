"""A checkpoint as a Hugging Face folder: python -m eval.export CHECKPOINT OUT

CHECKPOINT is a run folder, a checkpoint folder, or a .pt file of nanoGPT or of the official MARS code. The
folder is loaded back and its logits are compared on real tokens; one that differs is not left behind.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.loader import Windows
from data.shards import DataError, open_dataset
from data.tokenizer import Tokenizer
from eval.checkpoint import Trained, open_trained
from eval.command import model_parser
from model import GPT
from runtime.command import one_line

LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"
ROUNDING = 1e-5  # largest difference allowed, relative to the largest logit: float32 through some dozen layers
WINDOWS = 2  # windows of full context that are compared


def hugging_face_config(model: GPT, eot: int) -> object:
    """The GPT2Config of a model; eot is the id that starts and ends texts."""
    from transformers import GPT2Config

    c = model.config
    return GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
        # "gelu_new" is the same function in other floating point operations
        activation_function={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[c.gelu],
        layer_norm_epsilon=1e-5,
        scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=True,
        bos_token_id=eot,
        eos_token_id=eot,
    )


def to_hugging_face(model: GPT, eot: int) -> object:
    """A GPT2LMHeadModel with a model's weights: zero biases where there are none, padded rows cut."""
    from transformers import GPT2LMHeadModel

    out = GPT2LMHeadModel(hugging_face_config(model, eot))
    roles, source, target = model.parameter_roles(), dict(model.named_parameters()), out.state_dict()
    unused = source.keys() - target.keys()
    assert not unused, f"no place for {unused}"
    for name, p in target.items():
        if name == "lm_head.weight":  # tied
            continue
        if name not in source:
            assert name.endswith(".bias"), name
            p.zero_()
            continue
        w = source[name].detach().cpu()
        w = w.t() if roles[name] == "matrix" else w  # Hugging Face stores linear layers as (in, out)
        p.copy_(w[: p.size(0)] if name == "transformer.wte.weight" else w)
    return out.eval()


def byte_characters() -> dict[int, str]:
    """The printable character by which GPT-2's vocabulary files write each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins into a token: merge with smaller ranks until two are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        lowest, i = min(pairs)
        assert lowest < rank, token
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def hugging_face_tokenizer(tokenizer: Tokenizer, block_size: int) -> object:
    """A GPT2TokenizerFast that gives the ids of one of our tokenizers."""
    from transformers import GPT2TokenizerFast

    ranks = {bytes([b]): b for b in range(256)} if tokenizer.name == "byte" else tokenizer.ranks
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    order = sorted(ranks, key=ranks.__getitem__)
    merges = [merge_of(token, ranks[token], ranks) for token in order if len(token) > 1]
    return GPT2TokenizerFast(
        vocab={written(token): ranks[token] for token in order} | {"<|endoftext|>": tokenizer.eot},
        merges=[(written(a), written(b)) for a, b in merges],
        model_max_length=block_size,
    )


def sample_windows(trained: Trained) -> Tensor:
    """Real tokens (WINDOWS, block_size): from the run's validation split, else from this repository's license."""
    block_size, vocab_size = trained.model.config.block_size, trained.model.config.vocab_size
    if trained.kind == "checkpoint":
        try:
            shards = open_dataset(trained.state["config"]["data"]["path"], vocab_size).splits["val"]
            windows = Windows(shards, block_size, block_size)
            if len(windows) >= WINDOWS:
                ids = np.linspace(0, len(windows) - 1, WINDOWS).astype(np.int64)
                return torch.from_numpy(windows.read(ids, vocab_size)[:, :-1].astype(np.int64))
        except DataError:
            pass  # the dataset is on another machine
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(LICENSE.read_text(encoding="utf-8"))]
    ids = (ids * (1 + WINDOWS * block_size // len(ids)))[: WINDOWS * block_size]
    return torch.tensor(ids).view(WINDOWS, block_size)


@torch.inference_mode()
def logits_difference(model: GPT, folder: Path, windows: Tensor) -> tuple[float, float]:
    """Largest difference between a model's logits and those of a saved folder, and the largest logit.

    Both as AutoModelForCausalLM users get them: float32 on the CPU, no network.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    difference = largest = 0.0
    for window in windows.split(1):
        ours = model(window)
        difference = max(difference, (ours - theirs(window).logits).abs().max().item())
        largest = max(largest, ours.abs().max().item())
    return difference, largest


def tokenizer_difference(tokenizer: Tokenizer, folder: Path) -> str | None:
    """A text on which the saved tokenizer gives other ids, or None."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in (
        LICENSE.read_text(encoding="utf-8"),
        "def f(x):\n\treturn  {'a': 1}  # \u00fc\u4e2d\U0001f600\n\n",
        "it's 2026, isn't it? ",
    ):
        if theirs.encode(text, add_special_tokens=False, verbose=False) != tokenizer.encode(text):
            return text
    return None


def model_card(trained: Trained, difference: float) -> str:
    """README.md of an export: where the weights come from, their losses and the settings of the run."""
    c, state = trained.model.config, trained.state
    facts = {"parameters": f"{trained.model.num_params():,}", "weights sha256": trained.sha256}
    facts |= {k: state[k] for k in ("code", "step", "tokens", "val_loss", "best_val_loss") if state.get(k) is not None}
    facts |= {"attention also divided by layer + 1": c.scale_attn_by_inverse_layer_idx, "GELU": c.gelu}
    facts |= {"biases in training": c.bias, "tokenizer": trained.tokenizer.name, "vocabulary": c.vocab_size}
    facts |= {"largest logit difference to the checkpoint": f"{difference:.1e}"}
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]", "---", ""]
    lines += [f"# {trained.name}", "", "A GPT-2 for `AutoModelForCausalLM` and `AutoTokenizer`. Losses are in nats per"]
    lines += ["token on the run's validation split. Start texts with `<|endoftext|>`.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if "config" in state:
        lines += ["", "Settings of the run:", "", "```json", json.dumps(state["config"], indent=1), "```"]
    return "\n".join(lines) + "\n"


def export(trained: Trained, out: Path) -> tuple[float, float]:
    """Write a Hugging Face folder; returns the largest logit difference and the largest logit.

    Raises ValueError, and leaves no folder, if `out` holds something or the export does not compute the same.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; name a folder that does not")
    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        to_hugging_face(trained.model, trained.tokenizer.eot).save_pretrained(aside)
        hugging_face_tokenizer(trained.tokenizer, trained.model.config.block_size).save_pretrained(aside)
        difference, largest = logits_difference(trained.model, aside, sample_windows(trained))
        if not difference <= ROUNDING * max(1.0, largest):
            raise ValueError(
                f"the export's logits differ by {difference:.2e} (largest logit {largest:.1f}): more than rounding; "
                f"{out} was not written"
            )
        if (text := tokenizer_difference(trained.tokenizer, aside)) is not None:
            raise ValueError(f"the export's tokenizer reads {text[:30]!r} differently; {out} was not written")
        (aside / "README.md").write_text(model_card(trained, difference), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return difference, largest


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.export", "Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder, or .pt file of nanoGPT or MARS")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    with one_line("eval.export"):
        try:
            from transformers.utils import logging
        except ImportError:
            raise ImportError("export needs: pip install transformers") from None
        logging.disable_progress_bar()
        trained = open_trained(args.checkpoint, torch.device("cpu"), args.tokenizer, args.ranks)
        if trained.kind == "huggingface":
            raise ValueError(f"{args.checkpoint} is a Hugging Face folder already")
        difference, largest = export(trained, args.out)
    print(f"{args.out}: {trained.name}, vocabulary {trained.model.config.vocab_size}")
    print(f"largest logit difference {difference:.1e} on {WINDOWS} windows, largest logit {largest:.1f}")


if __name__ == "__main__":
    main()
