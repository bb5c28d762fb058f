"""Writes a checkpoint as a Hugging Face folder: python -m eval.export CHECKPOINT OUT

CHECKPOINT is a run folder, a checkpoint folder, or a .pt file of nanoGPT or of the official MARS code. The
export is loaded back and its logits are compared on real text. It is deleted if they differ.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.tokenizer import CharacterTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer
from eval.card import check_language, check_license, model_card, scores_of
from eval.command import model_parser
from model import GPT
from runtime.command import first_line, one_line
from runtime.errors import UserError
from runtime.files import UNFINISHED, delete_folder, follow_umask, locked, replace_folder
from training.plot import CURVES
from weights import HUGGING_FACE_KEYS, TRAINED_AS, Trained, open_trained

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"  # the text on which model and export are compared
HARD_TEXT = "def f(x):\n\treturn  {'a': 1}  # \u00fc\u4e2d\U0001f600\n\nit's 2026, isn't it? "  # for the tokenizer
ROUNDING = 1e-5  # largest difference allowed, relative to the largest logit: float32 through some dozen layers


def to_hugging_face(model: GPT, eot: int | None, stop: int | None) -> Any:
    """A GPT2LMHeadModel with a model's weights: zero biases where there are none, padded rows dropped.

    eot, stop: the ids that start and end texts; None if there are none.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    # n_ctx and task_specific_params: transformers does not write these keys of OpenAI's config.json by itself
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
        eos_token_id=stop,
        n_ctx=c.block_size,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
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
    """A tokenizer of transformers that gives the ids of one of ours, a GPT2TokenizerFast if ours has bytes."""
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if isinstance(tokenizer, CharacterTokenizer | FileTokenizer):
        options = {TRAINED_AS: tokenizer.name, "clean_up_tokenization_spaces": False}
        if tokenizer.stop is not None:
            options |= dict(bos_token=tokenizer.separator, eos_token=tokenizer.separator)
        return PreTrainedTokenizerFast(tokenizer_object=encoding(tokenizer), model_max_length=block_size, **options)
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


def encoding(tokenizer: CharacterTokenizer | FileTokenizer) -> Any:
    """A custom tokenizer as an object of the tokenizers library."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Encoding

    if isinstance(tokenizer, FileTokenizer):
        return Encoding.from_str(tokenizer.encoding.to_str())
    out = Encoding(models.WordLevel(tokenizer.ids))
    out.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    out.decoder = decoders.Fuse()
    return out


def readable(text: str, tokenizer: Tokenizer) -> str:
    """The characters of a text that a tokenizer can encode; all of its own if there are none."""
    if not isinstance(tokenizer, CharacterTokenizer):
        return text
    return "".join(c for c in text if c in tokenizer.ids) or "".join(tokenizer.ids)


@torch.inference_mode()
def logits_difference(trained: Trained, folder: Path) -> tuple[float, float]:
    """Largest difference between a model's logits and those of its export, and the largest logit.

    They are compared on real text, or on all ids if there is no tokenizer. The export is
    loaded as its users do: AutoModelForCausalLM, float32 on the CPU, no network.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    c, tokenizer = trained.model.config, trained.tokenizer
    if tokenizer is None:
        ids = [i % c.vocab_size for i in range(c.block_size)]
    else:
        ids = [tokenizer.eot, *tokenizer.encode(readable(TEXT.read_text(encoding="utf-8"), tokenizer))]
    window = torch.tensor([ids[: c.block_size]])
    ours = trained.model(window)
    return (ours - theirs(window).logits).abs().max().item(), ours.abs().max().item()


def tokenizers_agree(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether a saved tokenizer gives the same ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    text = readable(HARD_TEXT + TEXT.read_text(encoding="utf-8"), tokenizer)
    return theirs.encode(text, add_special_tokens=False, verbose=False) == tokenizer.encode(text)


def export(
    trained: Trained,
    out: Path,
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    language: str | None = None,
    scores: Sequence[dict] = (),
) -> tuple[float, float]:
    """Write a Hugging Face folder; returns the largest logit difference and the largest logit.

    dtype: of the weights in the folder. The weights of `trained` are rounded to it before the comparison.
    license, language, scores: for the model card, see `metadata` in eval/card.py.
    The folder gets its name when it is complete and on the disk. Raises UserError, and leaves no folder, if `out`
    exists or the export does not compute the same.
    """
    refuse_existing(out)
    temporary = out.with_name(UNFINISHED + out.name)
    delete_folder(temporary)  # a killed export may have left it
    temporary.mkdir(parents=True)
    try:
        trained.model.to(dtype).float()
        tokenizer = trained.tokenizer
        ends = (tokenizer.eot, tokenizer.stop) if tokenizer else (None, None)
        theirs = to_hugging_face(trained.model, *ends)
        with full_disk_in_one_line(out):
            theirs.to(dtype).save_pretrained(temporary)
            if tokenizer:
                fast = hugging_face_tokenizer(tokenizer, trained.model.config.block_size)
                fast.save_pretrained(temporary)
                fast.backend_tokenizer.model.save(str(temporary))  # vocab.json and merges.txt, which some programs read
        difference, largest = logits_difference(trained, temporary)
        if not difference <= ROUNDING * max(1.0, largest):  # a NaN counts as different
            reason = f"its logits differ by {difference:.2e} (largest logit {largest:.1f}), more than rounding"
            raise UserError(f"{out} was not written: {reason}")
        if tokenizer and not tokenizers_agree(tokenizer, temporary):
            raise UserError(f"{out} was not written: its tokenizer gives other ids")
        with full_disk_in_one_line(out):
            curves = trained.run_folder / CURVES if trained.run_folder else None
            drawn = curves is not None and curves.exists()
            if curves is not None and drawn:
                shutil.copyfile(curves, temporary / CURVES)
            card = model_card(trained, difference, license, language, list(scores), drawn)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            follow_umask(temporary)
            for path in temporary.iterdir():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        replace_folder(temporary, out)
    finally:
        delete_folder(temporary)
    return difference, largest


def refuse_existing(out: Path) -> None:
    """Raise UserError if a path exists, also if it is a broken link."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists; give a folder that does not exist yet")


@contextmanager
def full_disk_in_one_line(out: Path) -> Iterator[None]:
    """Turn errors of writing, from any library, into a UserError."""
    try:
        yield
    except Exception as error:  # the Rust library of tokenizers raises no other class
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        raise UserError(f"{out} was not written: {first_line(error)}") from None


def main(argv: list[str] | None = None) -> None:
    parser = model_parser("eval.export", "Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", help="run folder, checkpoint folder, or .pt file of nanoGPT or MARS")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write; must not exist")
    parser.add_argument("--out", dest="named", metavar="OUT", type=Path, help="another way to name it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in OUT")
    parser.add_argument("--license", help="of the weights, as the hub writes it, for example apache-2.0; default: none")
    parser.add_argument("--language", help="of the text, for example en; default: the dataset's, if it is known")
    parser.add_argument("--scores", type=Path, help="results.json of eval.run, to copy the scores of these weights")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.named is None):
        parser.error("give one folder to write: CHECKPOINT OUT, or CHECKPOINT --out OUT")
    out = args.out or args.named
    with one_line("eval.export"):
        try:
            from transformers.utils import logging
        except ImportError:
            raise UserError("export needs: pip install transformers") from None
        logging.disable_progress_bar()
        refuse_existing(out)  # before the work
        license = check_license(args.license) if args.license else None
        language = check_language(args.language) if args.language else None
        named = (args.tokenizer, args.ranks, args.eot)
        trained = open_trained(args.checkpoint, torch.device("cpu"), *named, text="if known")
        if trained.kind == "huggingface":
            raise UserError(f"{args.checkpoint} is a Hugging Face folder already")
        scores = scores_of(args.scores, trained)
        if args.scores and not scores:
            raise UserError(
                f"--scores {args.scores}: no complete score of these weights (sha256 {trained.sha256[:12]}...)"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(out.with_name(f".{out.name}.lock")):
                dtype = getattr(torch, args.dtype)
                difference, largest = export(trained, out, dtype, license, language, scores)
        except BlockingIOError:
            raise UserError(f"{out}: another export writes it at the moment") from None
    print(f"{out}: {trained.name}, vocabulary {trained.model.config.vocab_size}")
    if trained.tokenizer is None:
        print("without tokenizer files, because the tokenizer is not recorded; --tokenizer FILE adds them")
    print(f"largest logit difference {difference:.1e}, largest logit {largest:.1f}")


if __name__ == "__main__":
    main()
