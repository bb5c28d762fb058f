"""Trained models from wherever they are: our runs, Hugging Face folders, nanoGPT's and the MARS code's .pt files."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.shards import MANIFEST
from data.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer
from model import GPT, GPTConfig
from runtime.checkpoint import MODEL, STATE, Checkpoint, open_checkpoint
from runtime.files import sha256_of

WRAPPERS = ("_orig_mod.", "module.")  # prefixes that torch.compile and DDP leave in parameter names
RELEASED = re.compile(r"(openai-community/)?(gpt2(-medium|-large|-xl)?)")  # OpenAI's models on the hub
PADDING = 128  # rows by which a vocabulary may be larger than its tokenizer's
HUB_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


@dataclass
class Trained:
    """A model in evaluation mode with what is known of its training."""

    name: str  # short name for tables
    path: Path  # the checkpoint folder, Hugging Face folder or .pt file
    kind: str  # "checkpoint", "huggingface" or "pt"
    model: GPT
    tokenizer: Tokenizer
    sha256: str  # of the file that holds the weights
    state: dict  # of our checkpoints state.json; of a .pt file its step and loss; else empty

    @property
    def run_folder(self) -> Path | None:
        """The run folder a checkpoint of ours lies in."""
        return self.path.parent.parent if self.kind == "checkpoint" else None


def name_by_size(vocab_size: int) -> str:
    """The tokenizer a vocabulary size, perhaps padded to a multiple of 64, points at. ValueError if none."""
    sizes = {257: "byte", 320: "byte", 50257: "gpt2", 50304: "gpt2"}
    if vocab_size not in sizes:
        raise ValueError(f'vocab_size={vocab_size} fits no known tokenizer; name one with --tokenizer "byte" or "gpt2"')
    return sizes[vocab_size]


def build(config: GPTConfig, tensors: Mapping[str, Tensor], source: str, device: torch.device) -> GPT:
    """A GPT with the given weights (linear ones (out, in)), in evaluation mode.

    Wrapper prefixes, the tied output layer and causal masks of other code are understood; rows of the
    embedding beyond the vocabulary are cut. Raises ValueError, naming `source`, if the rest is not exactly a GPT-2.
    """
    try:
        model, found = GPT(config), {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its settings are not a GPT-2's ({error})") from None
    for name, tensor in tensors.items():
        while prefix := next((w for w in WRAPPERS if name.startswith(w)), None):
            name = name.removeprefix(prefix)
        if not re.fullmatch(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", name):
            found[name] = tensor
    output, embedding = found.pop("lm_head.weight", None), found.get("transformer.wte.weight")
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise ValueError(f"{source}: its output layer is not the token embedding, as GPT-2's is")
    wanted = dict(model.named_parameters())
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} is none of its parameters"
        raise ValueError(
            f"{source}: not the GPT-2 its settings describe ({what}; {len(missing) + len(extra)} such names)"
        )
    with torch.no_grad():
        for name, p in wanted.items():
            tensor = found[name]
            padded = name == "transformer.wte.weight"  # may have more rows than the vocabulary
            rows = config.vocab_size if padded else p.size(0)
            fits = tensor.dim() == p.dim() and tensor.shape[1:] == p.shape[1:]
            if not fits or tensor.size(0) < rows or (tensor.size(0) > rows and not padded):
                raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, its settings say {tuple(p.shape)}")
            p.zero_()[:rows].copy_(tensor[:rows])
    return model.to(device).eval()


def open_trained(
    path: str | Path, device: torch.device, tokenizer: str | None = None, ranks: str | None = None
) -> Trained:
    """A model from a run folder, a checkpoint folder, a Hugging Face GPT-2 folder, a .pt file or OpenAI's by its name.

    "gpt2", "gpt2-medium", "gpt2-large" and "gpt2-xl" come from the hub or its cache unless they are paths here.
    tokenizer: "byte" or "gpt2" to override what the source says. The vocabulary is cut to the tokenizer's.
    Raises ValueError, in one line, for a damaged file, another architecture or a tokenizer that does not fit.
    """
    released, path = RELEASED.fullmatch(str(path)), Path(path)
    if released and not path.exists():
        found = replace(_open_hugging_face(from_hub(released[2]), device, tokenizer, ranks), name=released[2])
    elif path.is_file():
        found = _open_pt(path, device, tokenizer, ranks)
    elif _is_hugging_face(path):
        found = _open_hugging_face(path, device, tokenizer, ranks)
    else:
        found = _open_checkpoint(open_checkpoint(path), (path / STATE).exists(), device, tokenizer, ranks)
    return _fit(found)


def from_hub(name: str) -> Path:
    """The folder of one of OpenAI's models in the hub's cache, fetched if need be. ValueError if it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError("models of the hub need: pip install huggingface_hub transformers") from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's and its HTTP library's own
        raise ValueError(
            f"{name}: neither in the hub's cache nor reachable ({type(error).__name__}). Copy "
            f"{', '.join(HUB_FILES[:3])} of https://huggingface.co/openai-community/{name} into a folder and name that"
        ) from None


def _fit(found: Trained) -> Trained:
    """Cut the vocabulary to the tokenizer's ids."""
    size, config = found.tokenizer.vocab_size, found.model.config
    if not size <= config.vocab_size < size + PADDING:
        raise ValueError(
            f"{found.path}: tokenizer {found.tokenizer.name}, {size} ids, does not fit vocab_size={config.vocab_size}"
        )
    if size < config.vocab_size:
        config = replace(config, vocab_size=size)
        device = next(found.model.parameters()).device
        found.model = build(config, dict(found.model.named_parameters()), str(found.path), device)
    return found


def _open_checkpoint(
    checkpoint: Checkpoint, named: bool, device: torch.device, tokenizer: str | None, ranks: str | None
) -> Trained:
    """named: the checkpoint itself was asked for; a run's name stands for its newest one."""
    folder, state = checkpoint.folder.resolve(), checkpoint.state
    try:
        config, data = GPTConfig(**state["config"]["model"]), state["config"]["data"]["path"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its config is not that of this program's GPT ({error})") from None
    if tokenizer is None:  # the dataset's, or by the number of ids if the dataset is gone
        manifest = Path(data, MANIFEST)
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        tokenizer = found.get("tokenizer", {}).get("name") or name_by_size(config.vocab_size)
    return Trained(
        name=folder.parent.parent.name + (f"/{folder.name}" if named else ""),
        path=folder,
        kind="checkpoint",
        model=build(config, checkpoint.model(), str(folder), device),
        tokenizer=get_tokenizer(tokenizer, ranks),
        sha256=state["sha256"][MODEL],
        state=state,
    )


def _open_pt(path: Path, device: torch.device, tokenizer: str | None, ranks: str | None) -> Trained:
    """A checkpoint of nanoGPT or of the official MARS code; plain tensors and numbers only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (reason := next((line for line in str(error).splitlines() if "GLOBAL" in line), None)) is None:
            raise ValueError(f"{path}: not readable as a torch file (no pickle of one)") from None
        raise ValueError(f"{path}: holds more than tensors and numbers, which is not loaded: {reason[:200]}") from None
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or ["it ends early"])[0]
        raise ValueError(f"{path}: not readable as a torch file ({reason})") from None
    args = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(args, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path}: not a checkpoint of nanoGPT or MARS (no model and model_args in it)")
    try:
        shape = {k: args[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    except KeyError as error:
        raise ValueError(f"{path}: another architecture than GPT-2 (model_args has no {error})") from None
    # nanoGPT's GELU is the exact one and it has no such key; the MARS code has it and uses the tanh form
    official = "scale_attn_by_inverse_layer_idx" in args
    scaled = bool(args.get("scale_attn_by_inverse_layer_idx"))
    config = GPTConfig(**shape, gelu="tanh" if official else "exact", scale_attn_by_inverse_layer_idx=scaled)
    model = build(config, content["model"], str(path), device)
    state = {"step": content.get("iter_num"), "code": "MARS" if official else "nanoGPT"}
    if content.get("best_val_loss") is not None:
        state["best_val_loss"] = float(content["best_val_loss"])
    chosen = get_tokenizer(tokenizer or name_by_size(config.vocab_size), ranks)
    return Trained(path.stem, path.resolve(), "pt", model, chosen, sha256_of(path), state)


def _is_hugging_face(path: Path) -> bool:
    """Whether a folder has a config.json that names a model type; a run folder's config.json does not."""
    file = path / "config.json"
    if not file.is_file() or (path / "checkpoints").is_dir():
        return False
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file}: not readable as JSON; export or copy it again") from None


def _open_hugging_face(path: Path, device: torch.device, tokenizer: str | None, ranks: str | None) -> Trained:
    """A Hugging Face GPT-2 folder, from safetensors or pytorch_model.bin."""
    config, files = _hugging_face_config(path), sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{path}: no model.safetensors or pytorch_model.bin in it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or ["it ends early"])[0]
            raise ValueError(f"{file}: damaged ({reason}); export or copy it again") from None
    named = {}
    for name, tensor in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        # Hugging Face stores linear layers as (in, out)
        linear = re.fullmatch(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight", name)
        named[name] = tensor.float().t() if linear else tensor.float()
    model = build(config, named, str(path), device)
    if tokenizer:
        chosen = get_tokenizer(tokenizer, ranks)
    elif (path / "tokenizer.json").exists() or (path / "merges.txt").exists():
        chosen = FolderTokenizer(path)
    else:
        chosen = get_tokenizer(name_by_size(model.config.vocab_size), ranks)
    return Trained(path.resolve().name, path.resolve(), "huggingface", model, chosen, sha256_of(files[0]), {})


def _hugging_face_config(path: Path) -> GPTConfig:
    """The shape that a config.json describes; ValueError if it is not a GPT-2's."""
    c = json.loads((path / "config.json").read_text(encoding="utf-8"))
    gelus = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    activation, width = c.get("activation_function", "gelu_new"), c.get("n_embd", 768)
    if c["model_type"] != "gpt2" or activation not in gelus:
        raise ValueError(f"{path}: {c['model_type']} with {activation} is not a GPT-2")
    if c.get("n_inner") not in (None, 4 * width):
        raise ValueError(f"{path}: n_inner={c['n_inner']} is not 4 n_embd, as GPT-2's is")
    if c.get("layer_norm_epsilon", 1e-5) != 1e-5 or not c.get("scale_attn_weights", True):
        raise ValueError(f"{path}: another layer norm or attention scale than GPT-2's")
    return GPTConfig(
        n_layer=c.get("n_layer", 12),
        n_head=c.get("n_head", 12),
        n_embd=width,
        block_size=c.get("n_positions", 1024),
        vocab_size=c.get("vocab_size", 50257),
        bias=True,
        gelu=gelus[activation],
        scale_attn_by_inverse_layer_idx=c.get("scale_attn_by_inverse_layer_idx", False),
    )


class FolderTokenizer:
    """The tokenizer files of a Hugging Face folder; special tokens in text are read as plain text."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library's own, and those of JSON and of Rust
            reason = (str(error).splitlines() or [""])[0][:120]
            raise ValueError(f"{folder}: its tokenizer files cannot be read ({reason}); use --tokenizer") from None
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"{folder}: its tokenizer has no end-of-text token; use --tokenizer")
        self.name, self.vocab_size, self.eot = "folder", len(self._tokenizer), self._tokenizer.eos_token_id
        if self.vocab_size == ByteTokenizer.vocab_size:
            self.name = "byte"
        elif self.vocab_size == 50257:
            self.name = "gpt2"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
