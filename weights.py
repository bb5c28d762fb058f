"""Opens trained models: our checkpoints, Hugging Face folders, and the .pt files of nanoGPT and the MARS code."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.shards import MANIFEST, read_manifest
from data.tokenizer import PADDING, Tokenizer, facts_by_size, facts_of, get_tokenizer, tokenizer_of
from model import GPT, GPTConfig
from optimizers.shards import load_whole
from runtime.command import first_line, is_out_of_memory
from runtime.errors import UserError
from runtime.files import read_json, sha256_of
from training.checkpoint import AVERAGE, MODEL, open_checkpoint

AVERAGED = ":average"  # after the path of a run or a checkpoint: its averaged weights, see --ema
RELEASED = re.compile(r"(openai-community/)?(gpt2(-medium|-large|-xl)?)")  # OpenAI's models on the hub
UNKNOWN = "unknown"  # name of a tokenizer that is not known
TRAINED_AS = "trained_as"  # key of an exported tokenizer_config.json: the name of the tokenizer in training
EMBEDDING = "transformer.wte.weight"
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # torch.compile and DDP add these to parameter names
CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
HUGGING_FACE_KEYS = {  # settings of GPTConfig: their names in a config.json
    "block_size": "n_positions",
    **{k: k for k in ("n_layer", "n_head", "n_embd", "vocab_size", "scale_attn_by_inverse_layer_idx")},
}
HUGGING_FACE_LINEAR = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")
HUB_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


@dataclass
class Trained:
    """A model in evaluation mode, its tokenizer, and the source of both."""

    name: str  # short name for tables
    path: Path  # the checkpoint folder, Hugging Face folder or .pt file
    kind: str  # "checkpoint", "huggingface" or "pt"
    model: GPT
    sha256: str  # hash of the file with the weights
    state: dict  # state.json of our checkpoints; step and loss of a .pt file; empty for Hugging Face folders
    facts: dict = field(default_factory=dict)  # the tokenizer, as in a manifest, or the "folder" of its files
    folders: tuple[Path, ...] = ()  # where the file of a custom tokenizer may be
    tokenizer: Tokenizer | None = None  # None if it is not loaded

    @property
    def run_folder(self) -> Path | None:
        """The run folder of one of our checkpoints."""
        return self.path.parent.parent if self.kind == "checkpoint" else None


def open_trained(
    path: str | Path,
    device: torch.device,
    tokenizer: str | None = None,
    ranks: str | None = None,
    eot: str | None = None,
    text: Literal["required", "if known", "unused"] = "required",
) -> Trained:
    """Open a run folder, a checkpoint folder, a Hugging Face GPT-2 folder, a .pt file or one of OpenAI's models.

    "RUN@STEP" opens the checkpoint of one step, "RUN:average" the averaged weights of a run. OpenAI's models have the
    names gpt2, gpt2-medium, gpt2-large and gpt2-xl; they come from the hub or its cache.
    tokenizer: "byte", "gpt2" or a file replaces the source's own. The model's vocabulary is cut to the tokenizer's ids.
    text: "required": raise UserError if the tokenizer is not known; "if known": load it if it is; "unused": load none.
    Raises UserError, in one line, for a damaged file, another architecture or a tokenizer that does not fit.
    """
    trained = read_trained(path)
    if eot is not None and not tokenizer:
        raise UserError(f"--eot {eot!r}: belongs to a tokenizer file; give --tokenizer FILE, too")
    padded_size = trained.model.config.vocab_size
    trained.facts = trained.facts or facts_by_size(padded_size) or {}
    chosen = get_tokenizer(tokenizer, ranks, eot) if tokenizer else known_tokenizer(trained, ranks, text)
    facts = facts_of(chosen) if chosen else trained.facts or {"name": UNKNOWN, "vocab_size": padded_size}
    size = facts["vocab_size"]
    if not size <= padded_size < size + PADDING:
        raise UserError(f"{path}: tokenizer {facts['name']}, {size} ids, does not fit vocab_size={padded_size}")
    cut_vocabulary(trained.model, size)
    return replace(trained, model=trained.model.to(device), facts=facts, tokenizer=chosen)


def read_trained(path: str | Path) -> Trained:
    """Open a model on the CPU as `open_trained` does, without its tokenizer. Raises the same errors."""
    text, path = str(path), Path(path).expanduser()
    if text.endswith(AVERAGED) and not path.exists():  # a run may have such a name
        return _read_checkpoint(Path(text.removesuffix(AVERAGED)).expanduser(), averaged=True)
    released = None if path.exists() else RELEASED.fullmatch(text)
    path = from_hub(released[2]) if released else path
    if path.is_file():
        return _read_pt(path)
    if settings := _hugging_face_settings(path):
        trained = _read_hugging_face(path, settings)
        return replace(trained, name=released[2]) if released else trained
    return _read_checkpoint(path)


def load_weights(model: GPT, path: str) -> str:
    """Copy the weights of another checkpoint into a model; returns the sha256 of the file that holds them.

    The context may be shorter than the checkpoint's: the first positions are used. The vocabulary may lack padding.
    Raises UserError, naming setting and values, if the models differ otherwise.
    """
    source = read_trained(path)
    theirs, ours = source.model.config, model.config
    keys = ("n_layer", "n_head", "n_embd", "bias", "gelu", "scale_attn_by_inverse_layer_idx")
    pairs = {key: (getattr(theirs, key), getattr(ours, key)) for key in keys}
    different = {key: values for key, values in pairs.items() if values[0] != values[1]}
    if theirs.block_size < ours.block_size:  # a longer context can be cut
        different["block_size"] = theirs.block_size, ours.block_size
    if not ours.vocab_size <= theirs.vocab_size < ours.vocab_size + PADDING:
        different["vocab_size"] = theirs.vocab_size, ours.vocab_size
    if different:
        settings = " ".join(f"--{key}={str(a).lower()}" for key, (a, _) in different.items())
        lines = "; ".join(f"{key}: the checkpoint has {a}, the run {b}" for key, (a, b) in different.items())
        raise UserError(f"init_from={path}: another model; give {settings} ({lines})")
    cut_vocabulary(source.model, ours.vocab_size)
    found = source.model.state_dict()
    found["transformer.wpe.weight"] = found["transformer.wpe.weight"][: ours.block_size]
    load_whole(model, found)
    return source.sha256


def known_tokenizer(trained: Trained, ranks: str | None, text: str) -> Tokenizer | None:
    """The tokenizer of a model, None if it is not known or not wanted. `text` is that of `open_trained`."""
    if "folder" in trained.facts:
        return FolderTokenizer(trained.facts["folder"])
    if not trained.facts and text == "required":
        ids = f"its vocab_size={trained.model.config.vocab_size} ids"
        raise UserError(f"{trained.path}: the tokenizer of {ids} is not recorded; give --tokenizer FILE")
    return tokenizer_of(trained.facts, trained.folders, ranks) if trained.facts and text != "unused" else None


def cut_vocabulary(model: GPT, size: int) -> None:
    """Cut the vocabulary to `size` ids. Later rows of the embedding become zeros if they are padding, else they go."""
    model.config = replace(model.config, vocab_size=size)
    rows = model.transformer.wte.weight.detach()[: model.config.padded_vocab_size]
    rows[size:] = 0
    model.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)


def build(config: GPTConfig, tensors: Mapping[str, Tensor], source: Path) -> GPT:
    """A GPT in evaluation mode, on the CPU, with the given weights; linear weights are (out, in).

    Wrapper prefixes in names, a tied output layer and causal masks are accepted. Rows of the embedding beyond the
    vocabulary are dropped. Raises UserError, naming `source`, if the rest is not exactly a GPT-2.
    """
    if errors := config.errors():
        raise UserError(f"{source}: its settings are not those of a GPT-2 ({'; '.join(errors)})")
    model = GPT(config)
    found = {WRAPPERS.sub("", str(name)): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if not CAUSAL_MASK.fullmatch(name)}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(f"{source}: {name} is not a tensor of weights")
    output, embedding = found.pop("lm_head.weight", None), found.get(EMBEDDING)
    if output is not None and embedding is not None and not torch.equal(output, embedding):
        raise UserError(f"{source}: its output layer is not the token embedding, as in GPT-2")
    parameters = dict(model.named_parameters())
    if different := sorted(parameters.keys() ^ found.keys()):
        problem = "is missing" if different[0] in parameters else "is not one of its parameters"
        count = f"{len(different)} such names"
        raise UserError(f"{source}: not the GPT-2 its settings describe ({different[0]} {problem}; {count})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor, p = found[name], parameter.detach()
            if name == EMBEDDING and tensor.dim():  # both tables may have more rows than the vocabulary
                tensor, p = tensor[: config.vocab_size], p.zero_()[: config.vocab_size]
            if tensor.shape != p.shape:
                raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, its settings say {tuple(p.shape)}")
            p.copy_(tensor)
    return model.eval()


def from_hub(name: str) -> Path:
    """Folder of one of OpenAI's models in the hub's cache, downloaded if necessary. UserError if that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client and its HTTP library raise many types
        raise UserError(
            f"{name}: neither in the hub's cache nor reachable ({type(error).__name__}). Copy "
            f"{', '.join(HUB_FILES[:3])} of https://huggingface.co/openai-community/{name} into a folder and name that"
        ) from None


def _read_checkpoint(path: Path, averaged: bool = False) -> Trained:
    """One of our checkpoint folders, or the newest checkpoint of a run folder."""
    if (path / MANIFEST).exists():
        raise UserError(f"{path}: is a dataset; give a run or a checkpoint")
    file = AVERAGE if averaged else MODEL
    checkpoint = open_checkpoint(path, wanted={file})  # the optimizer state is twice as large, and is not read
    folder, state = checkpoint.folder.resolve(), checkpoint.state
    try:
        config, data = GPTConfig(**state["config"]["model"]), Path(state["config"]["data"]["path"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its config is not that of this program's GPT ({error})") from None
    name = folder.parent.parent.name
    if not (path / "checkpoints").is_dir():  # the user named this step, not the run
        name += f"/{folder.name}"
    tensors = checkpoint.average() if averaged else checkpoint.model()
    if tensors is None:
        raise UserError(f"{path}{AVERAGED}: this run keeps no averaged weights; train with --ema=0.999, for example")
    name += AVERAGED if averaged else ""
    manifest, tokenizer = data / MANIFEST, state.get("tokenizer")
    if tokenizer is None and manifest.exists():  # the dataset may be on another machine
        tokenizer = read_manifest(manifest)["tokenizer"]
    model, places = build(config, tensors, path), (folder, folder.parent.parent, data)
    return Trained(name, folder, "checkpoint", model, state["sha256"][file], state, tokenizer or {}, places)


def _read_pt(path: Path) -> Trained:
    """A checkpoint file of nanoGPT or of the official MARS code."""
    content = _load(path)
    args = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(args, dict) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{path}: not a checkpoint of nanoGPT or MARS (no model and model_args in it)")
    try:
        shape = {k: args[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    except KeyError as error:
        raise UserError(f"{path}: another architecture than GPT-2 (model_args has no {error})") from None
    # Only the MARS code has this key. It uses the tanh form of the GELU, nanoGPT uses the exact one.
    official = "scale_attn_by_inverse_layer_idx" in args
    scaled = bool(args.get("scale_attn_by_inverse_layer_idx"))
    config = GPTConfig(**shape, gelu="tanh" if official else "exact", scale_attn_by_inverse_layer_idx=scaled)
    state: dict[str, Any] = {"code": "MARS" if official else "nanoGPT"}
    for theirs, key, kind in (("iter_num", "step", int), ("best_val_loss", "best_val_loss", float)):
        try:
            state[key] = None if content.get(theirs) is None else kind(content[theirs])
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"{path}: its {theirs} is not a number") from None
    return Trained(path.stem, path.resolve(), "pt", build(config, content["model"], path), sha256_of(path), state)


def _load(path: Path) -> Any:
    """The content of a .safetensors file, or of a torch file if it holds only tensors and plain values."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # torch's present format, which can be mapped instead of read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch's reader of damaged files raises many types
        if is_out_of_memory(error):
            raise
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: holds more than tensors and numbers ({found[1]}); it is not loaded") from None
        reason = "not a torch file" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise UserError(f"{path}: damaged or of another format ({reason})") from None


def _hugging_face_settings(path: Path) -> dict | None:
    """The config.json of a Hugging Face folder; None for other paths, also run folders, which name no model_type."""
    file = path / "config.json"
    if not file.is_file() or (path / "checkpoints").is_dir():
        return None
    settings = read_json(file, "readable as JSON; export or copy it again")
    return settings if isinstance(settings, dict) and "model_type" in settings else None


def _read_hugging_face(path: Path, settings: dict) -> Trained:
    """A Hugging Face GPT-2 folder, from safetensors or pytorch_model.bin."""
    config = _hugging_face_config(path, settings)
    names = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
    files = next((found for name in names if (found := sorted(path.glob(name)))), [])  # one file, or its parts
    if not files:
        raise UserError(f"{path}: no model.safetensors or pytorch_model.bin in it")
    tensors = {}
    parts = {file: _load(file) for file in files}
    for file, part in parts.items():
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise UserError(f"{file}: not a file of weights")
    for name, tensor in (item for part in parts.values() for item in part.items()):
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        is_matrix = isinstance(tensor, Tensor) and tensor.dim() == 2
        tensors[name] = (
            tensor.t() if is_matrix and HUGGING_FACE_LINEAR.fullmatch(name) else tensor
        )  # stored as (in, out)
    has_tokenizer = (path / "tokenizer.json").exists() or (path / "merges.txt").exists()
    model, path = build(config, tensors, path), path.resolve()
    facts = {"folder": path} if has_tokenizer else {}
    return Trained(path.name, path, "huggingface", model, sha256_of(files[0]), {}, facts)


def _hugging_face_config(path: Path, c: dict) -> GPTConfig:
    """The shape that the settings of a config.json describe; UserError if it is not a GPT-2's."""
    gelus: dict[Any, Any] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    activation = c.get("activation_function", "gelu_new")
    if c["model_type"] != "gpt2" or activation not in [*gelus]:
        raise UserError(f"{path}: {c['model_type']} with {activation} is not a GPT-2")
    if c.get("n_inner") not in (None, 4 * c["n_embd"] if type(c.get("n_embd")) is int else 3072):
        raise UserError(f"{path}: n_inner={c['n_inner']} is not 4 n_embd, as in GPT-2")
    if c.get("layer_norm_epsilon", 1e-5) != 1e-5 or not c.get("scale_attn_weights", True):
        raise UserError(f"{path}: another layer norm or attention scale than GPT-2's")
    shape = {ours: c[theirs] for ours, theirs in HUGGING_FACE_KEYS.items() if theirs in c}
    return GPTConfig(**shape, bias=True, gelu=gelus[activation])  # both formats have the defaults of GPT-2 small


class FolderTokenizer:
    """The tokenizer files of a Hugging Face folder; special tokens in text are read as plain text."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers and its Rust library raise many types
            reason = first_line(error)
            raise UserError(f"{folder}: its tokenizer files cannot be read ({reason}); use --tokenizer") from None
        self.folder, self.vocab_size, self.stop = folder, len(self._tokenizer), self._tokenizer.eos_token_id
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        start = settings.get("bos_token_id") if self.stop is None else self.stop
        if type(start) is not int or start >= self.vocab_size:
            raise UserError(f"{folder}: its tokenizer has no end-of-text token; use --tokenizer")
        by_size = {257: "byte", 50257: "gpt2"}.get(self.vocab_size, "folder")
        self.eot, self.name = start, self._tokenizer.init_kwargs.get(TRAINED_AS, by_size)

    def encode(self, text: str) -> list[int]:
        options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
        try:
            return self._tokenizer.encode(text, **options)
        except Exception as error:  # the Rust library's, for a character without an id
            raise UserError(f"{self.folder}: its tokenizer cannot encode the text ({first_line(error)})") from None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
