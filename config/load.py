"""From a config file and `--key=value` overrides to a checked RunConfig.

A config file is an ordinary Python module that defines `config`, a RunConfig. It may also define `optimizers`, a dict
from names to optimizer settings. An override gives the full key (`--schedule.min_lr=1e-5`), or its last part if only
one key ends with it (`--min_lr=1e-5`).
"""

import dataclasses
import difflib
import itertools
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.published import published
from data.shards import MANIFEST, DataError, entries, read_manifest
from data.tokenizer import PADDING
from optimizers import OPTIMIZERS, Settings
from optimizers.options import Option, options_of
from runtime.command import count, parse_number, short_count
from runtime.errors import UserError
from training.run_config import ALTERNATIVES, SECTIONS, RunConfig, all_keys, changeable_keys, value_of

PATHS = ("data.path", "data.hellaswag", "log.folder")
OWN_MODULES = re.compile(r"config\.(load|schema|published)|(data|model|optimizers|runtime)(\..*)?")
SWITCH_WORDS = {"true": ("true", "online"), "false": ("false", "off")}  # what a switch means for an option with choices
SWITCH_WORDS |= {"1": SWITCH_WORDS["true"]} | dict.fromkeys(("0", "none", "null"), SWITCH_WORDS["false"])
NANOGPT = {  # names in nanoGPT's configuration: what to give here
    "learning_rate": "--optim.lr",
    "max_iters": "--steps",
    "lr_decay_iters": "--steps, as the schedule ends with the run",
    "warmup_iters": "--schedule.warmup",
    "decay_lr": "--schedule.shape=cosine or constant",
    "beta1": "--optim.betas=0.9,0.95, both in one setting",
    "beta2": "--optim.betas=0.9,0.95, both in one setting",
    "gradient_accumulation_steps": "--batch_size, sequences per step over all processes, and --micro_batch",
    "eval_interval": "--eval_every",
    "eval_iters": "--data.val_windows, in sequences",
    "eval_only": "python -m eval.perplexity RUN",
    "log_interval": "--log.every",
    "always_save_checkpoint": "--checkpoint.every and --checkpoint.keep",
    "out_dir": "--log.folder and --name",
    "dataset": "--data.path, a folder",
    "wandb_log": "--log.wandb=online",
    "wandb_project": "--log.project",
    "wandb_run_name": "--name",
    "backend": "nothing to set, the device decides",
}


class ConfigError(UserError):
    """All errors of a configuration, one a line."""

    names_itself = True  # every line starts with "config:"

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(f"config: {error}" for error in errors))


def load_config(path: str | Path, overrides: Sequence[str] = (), as_published: bool = False) -> RunConfig:
    """Read a config file, apply `--key=value` overrides, and check the result.

    as_published: first apply the settings of the official MARS and MARS-M runs (config/published.py).
    Raises ConfigError with every error found.
    """
    path = Path(path).expanduser()
    config, optimizers = _read_file(path)
    given, errors = _split(overrides)
    if (source := given.get("init_from")) in ("resume", "scratch") and not Path(source).exists():
        errors.append(f"init_from={source}: leave it out; the same command continues a run, and --fresh starts it over")

    for key in ("gamma_end", "optim.gamma_end"):  # another spelling of schedule.moves
        if key in given:
            others = [given.pop(k) for k in ("moves", "schedule.moves") if k in given]
            given["schedule.moves"] = ",".join([*filter(None, others), f"gamma:{given.pop(key)}"])

    name, settings = given.pop("optimizer", config.optimizer) or "", OPTIMIZERS | optimizers
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=3, cutoff=0.4) or sorted(settings)
        errors.append(f'optimizer="{name}": unknown; nearest: {", ".join(near)}')
        name = "adamw"  # any one, to check the other settings
    config = dataclasses.replace(config, size=config.size or path.stem, optimizer=name, optim=settings[name])
    if as_published:
        config = published(config)

    changes = _read_all(given, all_keys(config), errors)
    for pair in ALTERNATIVES:  # an override of one of the two replaces the other one of the config file
        for key, other in (pair, pair[::-1]):
            if key in changes and other not in changes:
                changes[other] = None
    config = apply(config, changes)
    if "model.vocab_size" not in changes:
        config = _with_vocabulary_of_data(config, path)
    errors += config.errors()
    if errors:
        raise ConfigError(errors)
    config = apply(config, {key: os.path.expanduser(value_of(config, key)) for key in PATHS})
    config = dataclasses.replace(config, name=config.name or run_name(config, changes, as_published))
    origin = config.branch_from.rpartition("@")[0]
    if origin and Path(origin).resolve() == Path(config.log.folder, config.name).resolve():
        raise ConfigError([f"branch_from={config.branch_from}: a run cannot branch into itself; give another --name"])
    return config


def optimizer_settings(name: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of an optimizer with `--key=value` overrides, for programs without a config file.

    Raises ConfigError with every error found.
    """
    given, errors = _split(overrides)
    keys = {f"optim.{key}": declared for key, declared in options_of(type(OPTIMIZERS[name])).items()}
    changes = _read_all(given, keys, errors)
    settings = OPTIMIZERS[name].changed(**{key.partition(".")[2]: value for key, value in changes.items()})
    if errors := errors + settings.errors():
        raise ConfigError(errors)
    return settings


def apply(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A RunConfig with dotted keys changed."""
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        if section:
            value, last = dataclasses.replace(getattr(config, section), **{last: value}), section
        config = dataclasses.replace(config, **{last: value})
    return config


def run_name(config: RunConfig, changes: dict[str, Any], as_published: bool) -> str:
    """size-optimizer-dataset-budget, and every override that changes the result, so that names differ."""
    dataset = Path(config.data.path).name
    parts = [config.size, config.optimizer, dataset, short_count(config.total_steps * config.tokens_per_step)]
    parts += ["published"] if as_published else []
    if config.init_from and "init_from" not in changes:  # the config file sets it
        parts.append(f"init_from{config.init_from}")
    already_named = {"steps", "tokens", "data.path", *changeable_keys(RunConfig())}
    for key, value in changes.items():
        value = "auto" if key == "optim.gamma" and value is None else value
        if key not in already_named and (value is not None or key not in itertools.chain(*ALTERNATIVES)):
            text = "x".join(map(_text, value)) if isinstance(value, tuple) else _text(value)
            parts.append(f"{key.rpartition('.')[2]}{text}")
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(parts))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A RunConfig as plain nested dicts, for JSON."""
    return dataclasses.asdict(config)


def saved_config(folder: Path) -> RunConfig:
    """The RunConfig of a run folder. Raises ConfigError if the folder holds none that this program can read."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kinds = {name: type(getattr(RunConfig(), name)) for name in SECTIONS}
        kinds["optim"] = type(OPTIMIZERS[saved["optimizer"]])
        values = {f.name: saved[f.name] for f in dataclasses.fields(RunConfig) if f.name in saved}
        for name, kind in kinds.items():
            values[name] = kind(**{key: _as_tuples(value) for key, value in saved[name].items()})
        return RunConfig(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError([f"{path}: not the configuration of a run ({type(error).__name__}: {error})"]) from None


def _as_tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def describe_keys(config: RunConfig) -> str:
    """Every key with its present value and its meaning, one a line."""
    keys = all_keys(config)
    top_first = sorted(keys, key=lambda key: "." in key)
    return "\n".join(f"  --{key}={_text(value_of(config, key))}  {keys[key].help}" for key in top_first)


def parse(text: str | None, declared: Option) -> Any:
    """Read a command-line value. The UserError says what was expected.

    A switch needs no value; an option with the choice "true" or "online" is one, too. "none" and "auto" are None where
    that is allowed. Numbers may end in k, M, B or T.
    """
    kind, choices, expected = declared.kind, declared.choices, UserError(f"expected {declared.description}")
    is_switch = kind is bool or not {"true", "online"}.isdisjoint(choices)
    if text is None:
        if not is_switch:
            raise UserError("expected --key=value")
        text = "true"
    word = text.lower()
    if declared.may_be_none and word in ("none", "auto"):
        return None
    if choices and not (declared.several and "," in text):
        words = (word, *(SWITCH_WORDS.get(word, ()) if is_switch else ()))
        return next((choice for choice in choices if choice in words), text)
    if kind is str:
        return text
    if kind is bool:
        if word not in ("true", "false", "1", "0"):
            raise expected
        return word in ("true", "1")
    parts = [text] if declared.length is None else re.sub(r"[()\[\]]", "", text).split(",")
    if declared.several:
        if len(parts) % (declared.length or 1):
            raise expected
    elif declared.length not in (None, len(parts)):
        raise UserError(f"{expected}, for example 0.9,0.95")
    try:
        numbers = tuple(count(part.strip()) if kind is int else float(parse_number(part.strip())) for part in parts)
    except ValueError:
        raise expected from None
    if declared.several:
        n = declared.length or 1
        return tuple(numbers[i : i + n] for i in range(0, len(numbers), n))
    return numbers if declared.length else numbers[0]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _split(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """`--key=value` and `--key` arguments as a dict, and the errors of all other arguments."""
    given: dict[str, str | None] = {}
    errors = []
    for argument in overrides:
        if match := re.fullmatch(r"--([\w.-]+)(?:=(.*))?", argument, re.DOTALL):
            key = match.group(1).replace("-", "_")
            given.pop(key, None)  # the last one counts
            given[key] = match.group(2)
        else:
            errors.append(f"{argument}: expected --key=value")
    return given, errors


def _read_all(given: dict[str, str | None], keys: dict[str, Option], errors: list[str]) -> dict[str, Any]:
    """The full keys and the values of all overrides; what is wrong with the others is added to `errors`."""
    changes: dict[str, Any] = {}
    for key, text in given.items():
        try:
            changes |= _read(key, text, keys)
        except ValueError as error:
            errors.append(str(error))
    return changes


def _read(key: str, text: str | None, keys: dict[str, Option]) -> dict[str, Any]:
    """The full key and the value of an override. Raises UserError if one of them is wrong."""
    full = _full_key(key, keys)
    try:
        return {full: parse(text, keys[full])}
    except ValueError as error:
        raise UserError(f"--{key}: {error}" if text is None else f"{key}={text}: {error}") from None


def _full_key(key: str, keys: dict[str, Option]) -> str:
    """The dotted key that an override means. Raises UserError, with the nearest keys, if there is none."""
    if key in keys:
        return key
    ends = [k for k in keys if k.rpartition(".")[2] == key]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"{key}: could be {' or '.join(ends)}; give the full key")
    if ours := NANOGPT.get(key):
        raise UserError(f"{key}: nanoGPT's name; here: {ours}")
    if key in {option for settings in OPTIMIZERS.values() for option in options_of(type(settings))}:
        own = ", ".join(k.rpartition(".")[2] for k in keys if k.startswith("optim."))
        raise UserError(f"{key}: this optimizer has no such setting; it has {own}")
    short = {k.rpartition(".")[2]: k for k in keys}
    near = difflib.get_close_matches(key, [*keys, *short], n=3, cutoff=0.5)
    near = list(dict.fromkeys(short.get(k, k) for k in near))
    raise UserError(f"{key}: unknown key; nearest: {', '.join(near) or 'none (see --help)'}")


def _with_vocabulary_of_data(config: RunConfig, path: Path) -> RunConfig:
    """The config with the size of the dataset's tokenizer as vocab_size, if the vocabulary does not fit the tokens.

    A larger vocabulary fits if it is padding. Without a manifest the config stays as it is.
    """
    given = config.model.vocab_size
    try:
        manifest = read_manifest(Path(os.path.expanduser(config.data.path), MANIFEST))
        size, largest = (
            manifest["tokenizer"]["vocab_size"],
            max((e["max_token"] for e in entries(manifest)), default=-1),
        )
        if "file" in manifest["tokenizer"]:
            largest = size - 1  # as open_dataset requires
        if type(size) is not int or largest < given < size + PADDING:
            return config
    except (OSError, DataError, TypeError):  # the same error is raised later, by open_dataset or by the check
        return config
    if os.environ.get("RANK", "0") == "0":
        why = f"the tokenizer of {config.data.path} has {size} ids; {path} has {given}, which does not fit"
        print(f"note: vocab_size={size}: {why}", file=sys.stderr)
    return apply(config, {"model.vocab_size": size})


def run_file(path: Path) -> dict[str, Any]:
    """Run a Python file of the user and return what it defines.

    Raises UserError, which names the file and the line in it or in a neighbour, if it fails. With TRACEBACK=1 in the
    environment its own error is raised.
    """
    sys.path.append(str(path.parent.resolve()))  # it may import its neighbours
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        if os.environ.get("TRACEBACK", "0") not in ("", "0"):
            raise
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{_place(error, path)}: {kind}{text}".removesuffix(": ")) from None
    finally:
        sys.path.pop()


def _place(error: BaseException, path: Path) -> str:
    """FILE:LINE of an error: the deepest line in the folder of `path` that is not in this program or in a library."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename and os.path.isfile(error.filename):
        return f"{error.filename}:{error.lineno}"
    place, folder = str(path), path.parent.resolve()
    for frame, line in traceback.walk_tb(error.__traceback__):
        name, file = frame.f_globals.get("__name__", ""), Path(frame.f_code.co_filename)
        is_users = not OWN_MODULES.fullmatch(name) and "site-packages" not in file.parts and file.is_file()
        if is_users and folder in file.resolve().parents:
            place = f"{file}:{line}"
    return place


def _read_file(path: Path) -> tuple[RunConfig, dict[str, Settings]]:
    """Run a config file and take its two definitions."""
    if not path.is_file() or path.suffix != ".py":
        shipped = sorted(p for p in Path(__file__).parent.glob("*.py") if b"\nconfig = " in p.read_bytes())
        raise ConfigError([f"{path}: no such config file; there are: {', '.join(map(str, shipped))}"])
    try:
        module = run_file(path)
    except UserError as error:
        raise ConfigError([str(error)]) from None
    config, optimizers = module.get("config"), module.get("optimizers", {})
    if not isinstance(config, RunConfig) or not isinstance(optimizers, dict):
        raise ConfigError([f"{path}: must define `config`, a RunConfig, and may define `optimizers`, a dict"])
    sections = {name: type(getattr(RunConfig(), name)) for name in SECTIONS if name != "optim"}
    wrong = [
        f"{path}: optimizers[{name!r}] must be the settings of an optimizer"
        for name, settings in optimizers.items()
        if not isinstance(settings, Settings)
    ]
    for name, cls in sections.items():
        if type(getattr(config, name)) is not cls:
            wrong.append(f"{path}: {name} must be a {cls.__name__}")
    if wrong:
        raise ConfigError(wrong)
    return config, optimizers
