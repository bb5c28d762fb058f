"""Writes a checkpoint as a Hugging Face folder: python -m eval.export CHECKPOINT OUT

CHECKPOINT is a run folder, a checkpoint folder, or a .pt file of nanoGPT or of the official MARS code. The
export is loaded back and its logits are compared on real text. It is deleted if they differ.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import GPT2Tokenizer, Tokenizer
from eval.checkpoint import HUGGING_FACE_KEYS, Trained, open_trained
from eval.command import model_parser
from model import GPT
from runtime.command import one_line

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"  # the text on which model and export are compared
HARD_TEXT = "def f(x):\n\treturn  {'a': 1}  # \u00fc\u4e2d\U0001f600\n\nit's 2026, isn't it? "  # for the tokenizer
ROUNDING = 1e-5  # largest difference allowed, relative to the largest logit: float32 through some dozen layers


def to_hugging_face(model: GPT, eot: int) -> Any:
    """A GPT2LMHeadModel with a model's weights: zero biases where there are none, padded rows dropped.

    eot: the id that starts and ends texts.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        **{theirs: getattr(c, ours) for ours, theirs in HUGGING_FACE_KEYS.items()},
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
        # "gelu_new" is the same function, but rounds differently
        activation_function={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[c.gelu],
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        bos_token_id=eot,
        eos_token_id=eot,
    )
    out, roles = GPT2LMHeadModel(config), model.parameter_roles()
    weights = {name: torch.zeros_like(p) for name, p in out.named_parameters() if name.endswith(".bias")}
    for name, p in model.named_parameters():
        weights[name] = p.detach().t() if roles[name] == "matrix" else p.detach()  # stored as (in, out)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: c.vocab_size]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    out.load_state_dict(weights)
    return out.eval()


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins into a token: merge by smaller ranks until two parts remain."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        lowest, i = min(pairs)
        assert lowest < rank, token
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def hugging_face_tokenizer(tokenizer: Tokenizer, block_size: int) -> Any:
    """A GPT2TokenizerFast that gives the ids of one of our tokenizers."""
    from transformers import GPT2TokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = tokenizer.ranks if isinstance(tokenizer, GPT2Tokenizer) else {bytes([b]): b for b in range(256)}
    characters = bytes_to_unicode()  # vocabulary files write each byte as a printable character

    def written(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    order = sorted(ranks, key=ranks.__getitem__)
    merges = [merge_of(token, ranks[token], ranks) for token in order if len(token) > 1]
    return GPT2TokenizerFast(
        vocab={written(token): ranks[token] for token in order} | {"<|endoftext|>": tokenizer.eot},
        merges=[(written(a), written(b)) for a, b in merges],
        model_max_length=block_size,
    )


@torch.inference_mode()
def logits_difference(trained: Trained, folder: Path) -> tuple[float, float]:
    """Largest difference between a model's logits and those of its export, and the largest logit, on real text.

    The export is loaded as its users do: AutoModelForCausalLM, float32 on the CPU, no network.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(TEXT.read_text(encoding="utf-8"))]
    window = torch.tensor([ids[: trained.model.config.block_size]])
    ours = trained.model(window)
    return (ours - theirs(window).logits).abs().max().item(), ours.abs().max().item()


def tokenizers_agree(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether a saved tokenizer gives the same ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    text = HARD_TEXT + TEXT.read_text(encoding="utf-8")
    return theirs.encode(text, add_special_tokens=False, verbose=False) == tokenizer.encode(text)


def model_card(trained: Trained, difference: float) -> str:
    """README.md of an export: where the weights come from, their losses and the settings of the run."""
    c, state = trained.model.config, trained.state
    facts: dict[str, object] = {"parameters": f"{trained.model.num_params():,}", "weights sha256": trained.sha256}
    facts |= {k: state[k] for k in ("code", "step", "tokens", "val_loss", "best_val_loss") if state.get(k) is not None}
    facts |= {
        "attention also divided by layer + 1": c.scale_attn_by_inverse_layer_idx,
        "GELU": c.gelu,
        "biases in training": c.bias,
        "tokenizer": trained.tokenizer.name,
        "vocabulary": c.vocab_size,
        "largest logit difference to the checkpoint": f"{difference:.1e}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    settings = ""
    if "config" in state:
        settings = f"\nSettings of the run:\n\n```json\n{json.dumps(state['config'], indent=1)}\n```\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
---

# {trained.name}

A GPT-2 for `AutoModelForCausalLM` and `AutoTokenizer`. Losses are in nats per
token on the run's validation split. Start texts with `<|endoftext|>`.

| | |
|---|---|
{rows}
{settings}"""


def export(trained: Trained, out: Path, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Write a Hugging Face folder; returns the largest logit difference and the largest logit.

    dtype: of the weights in the folder. Those of `trained` are rounded to it, so equal weights are compared.
    Raises ValueError, and leaves no folder, if `out` exists or the export does not compute the same.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        trained.model.to(dtype).float()
        to_hugging_face(trained.model, trained.tokenizer.eot).to(dtype).save_pretrained(temporary)
        theirs = hugging_face_tokenizer(trained.tokenizer, trained.model.config.block_size)
        theirs.save_pretrained(temporary)
        theirs.backend_tokenizer.model.save(str(temporary))  # vocab.json and merges.txt, which some programs read
        difference, largest = logits_difference(trained, temporary)
        if not difference <= ROUNDING * max(1.0, largest):  # a NaN counts as different
            reason = f"its logits differ by {difference:.2e} (largest logit {largest:.1f}), more than rounding"
            raise ValueError(f"{out} was not written: {reason}")
        if not tokenizers_agree(trained.tokenizer, temporary):
            raise ValueError(f"{out} was not written: its tokenizer gives other ids")
        (temporary / "README.md").write_text(model_card(trained, difference), encoding="utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference, largest


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.export", "Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder, or .pt file of nanoGPT or MARS")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in OUT")
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
        difference, largest = export(trained, args.out, getattr(torch, args.dtype))
    print(f"{args.out}: {trained.name}, vocabulary {trained.model.config.vocab_size}")
    print(f"largest logit difference {difference:.1e}, largest logit {largest:.1f}")


if __name__ == "__main__":
    main()
