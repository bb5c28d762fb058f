"""From a config file and `--key=value` overrides to a checked RunConfig.

A config file is an ordinary Python module that defines `config`, a RunConfig, and `optimizers`, a dict
from names to optimizer settings. A key is given in full (`--schedule.min_lr=1e-5`) or by its last part
where that is unique (`--min_lr=1e-5`).
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import types
import typing
from pathlib import Path

from config.schema import ALTERNATIVES, SECTIONS, RunConfig, free_keys
from optimizers import OPTIMIZERS, OptimizerConfig

PATHS = (("data", "path"), ("data", "choices"), ("log", "folder"))


class ConfigError(ValueError):
    """All faults of a configuration, one a line."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(f"config: {fault}" for fault in faults))


def load_config(path: str | Path, overrides: list[str] = (), as_published: bool = False) -> RunConfig:
    """Read a config file, apply `--key=value` overrides, and check the result.

    as_published: start from what the official MARS and MARS-M runs did (see config/published.py).
    Raises ConfigError with every fault found.
    """
    path = Path(path).expanduser()
    config, optimizers = _read_module(path)
    config = dataclasses.replace(config, size=config.size or path.stem)
    given, faults = _split(overrides)

    name = given.pop("optimizer", config.optimizer) or ""
    settings = OPTIMIZERS | optimizers
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=3, cutoff=0.4) or sorted(settings)
        faults.append(f'optimizer="{name}": unknown; nearest: {", ".join(near)}')
        name = "adamw"  # to check the rest
    config = dataclasses.replace(config, optimizer=name, optim=settings[name])
    if as_published:
        from config.published import published

        config = published(config)

    keys = all_keys(config)
    changes: dict[str, object] = {}
    for key, text in given.items():
        found, fault = _resolve(key, keys)
        if fault is None:
            try:
                changes[found] = parse(text, keys[found]) if text is not None else _switched_on(keys[found])
            except ValueError as error:
                fault = f"--{key}: {error}" if text is None else f"{key}={text}: {error}"
        if fault is not None:
            faults.append(fault)
    for pair in ALTERNATIVES:  # saying one of two alternatives withdraws the other
        for key, other in (pair, pair[::-1]):
            if key in changes and other not in changes:
                changes[other] = None
    config = apply(config, changes)
    faults += type_faults(config) or config.faults()
    if faults:
        raise ConfigError(faults)
    for section, key in PATHS:  # no shell expands the ~ of --key=~/folder
        config = apply(config, {f"{section}.{key}": os.path.expanduser(getattr(getattr(config, section), key))})
    return dataclasses.replace(config, name=config.name or run_name(config, changes, as_published))


def apply(config: RunConfig, changes: dict[str, object]) -> RunConfig:
    """A RunConfig with dotted keys changed."""
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        if section:
            value, last = dataclasses.replace(getattr(config, section), **{last: value}), section
        config = dataclasses.replace(config, **{last: value})
    return config


def run_name(config: RunConfig, changes: dict[str, object], as_published: bool) -> str:
    """size-optimizer-dataset-budget and every override that changes the result, so that runs keep apart."""
    dataset = Path(config.data.path).name
    parts = [config.size, config.optimizer, dataset, short_count(config.total_steps * config.tokens_per_step)]
    parts += ["published"] if as_published else []
    told = {"steps", "tokens", "data.path", *free_keys()}
    for key, value in changes.items():
        if key not in told and value is not None:
            text = "x".join(f"{v:g}" for v in value) if isinstance(value, tuple) else _text(value)
            parts.append(f"{key.rpartition('.')[2]}{text}")
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(parts))


def short_count(n: int) -> str:
    """12345678 -> "12.3M"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def to_dict(config: RunConfig) -> dict:
    """A RunConfig as plain nested dicts, for JSON."""
    return dataclasses.asdict(config)


def all_keys(config: RunConfig) -> dict[str, typing.Any]:
    """Every dotted key of a run, with the type its schema declares."""
    keys = {}
    for key, kind in typing.get_type_hints(RunConfig).items():
        if key in SECTIONS:
            part = type(getattr(config, key))
            keys |= {f"{key}.{k}": t for k, t in typing.get_type_hints(part).items()}
        else:
            keys[key] = kind
    return keys


def type_faults(config: RunConfig) -> list[str]:
    """Values, wherever they come from, that are not of the type the schema declares, a line each."""
    out = []
    for key, kind in all_keys(config).items():
        section, _, last = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, last)
        if key not in SECTIONS and not _is_of(value, kind):
            out.append(f"{key}={value!r}: expected {getattr(kind, '__name__', kind)}")
    return out


def _is_of(value: object, kind: typing.Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is_of, value, inner))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def describe_keys(config: RunConfig) -> str:
    """Every key with its present value and the comment that stands beside it in the code."""
    lines = []
    for section in ("", *SECTIONS):
        part = getattr(config, section) if section else config
        source = "".join(inspect.getsource(c) for c in type(part).__mro__ if dataclasses.is_dataclass(c))
        for f in dataclasses.fields(part):
            if f.name not in SECTIONS:
                comment = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.MULTILINE)
                key = f"--{section}.{f.name}" if section else f"--{f.name}"
                lines.append(f"  {key}={_text(getattr(part, f.name))}  {comment.group(1) if comment else ''}")
    return "\n".join(lines)


def parse(text: str, kind: typing.Any) -> object:
    """Read a command-line value as the type the schema declares; ValueError says what was expected."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", "auto"):
        return None
    kind = next(k for k in options if k is not type(None))
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("expected true or false")
        return text.lower() in ("true", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, tuple | list) and len(value) == len(inner):
            return tuple(_number(v, k) for v, k in zip(value, inner, strict=True))
        raise ValueError(f"expected {len(inner)} numbers, for example 0.9,0.95")
    return _number(value, kind)


def _number(value: object, kind: type) -> int | float:
    names = {int: "a whole number", float: "a number"}
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not whole):
        raise ValueError(f"expected {names[kind]}")
    return kind(value)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _switched_on(kind: typing.Any) -> bool:
    """The value of a key that is given without one; ValueError if it is no switch."""
    if kind is not bool:
        raise ValueError("expected --key=value")
    return True


def _split(overrides: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """`--key=value` and `--key` arguments as a dict, and what could not be read as one."""
    given, faults = {}, []
    for argument in overrides:
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            given.pop(match.group(1), None)  # the last one counts, however its key is spelled
            given[match.group(1)] = match.group(2)
        else:
            faults.append(f"{argument}: expected --key=value")
    return given, faults


def _resolve(key: str, keys: dict) -> tuple[str, str | None]:
    """The dotted key meant by `key`, or what is wrong with it."""
    if key in keys and key not in SECTIONS:
        return key, None
    ends = [k for k in keys if k.rpartition(".")[2] == key]
    if len(ends) == 1:
        return ends[0], None
    if ends:
        return "", f"{key}: could be {' or '.join(ends)}; give the full key"
    short = {k.rpartition(".")[2]: k for k in keys}
    near = difflib.get_close_matches(key, [*keys, *short], n=3, cutoff=0.5)
    near = list(dict.fromkeys(short.get(k, k) for k in near))
    return "", f"{key}: unknown key; nearest: {', '.join(near) or 'none (see --help)'}"


def _read_module(path: Path) -> tuple[RunConfig, dict]:
    """Import a config file under a private name and take its two definitions."""
    if not path.is_file() or path.suffix != ".py":
        near = _configs_in(path if path.is_dir() else path.parent) or _configs_in(Path(__file__).parent)
        reason = "a folder, not a config file" if path.is_dir() else "no such config file"
        raise ConfigError([f"{path}: {reason}; there are: {', '.join(map(str, near))}"])
    spec = importlib.util.spec_from_file_location(f"_config_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError([f"{path}: {type(error).__name__}: {error}"]) from None
    config, optimizers = getattr(module, "config", None), getattr(module, "optimizers", {})
    if not isinstance(config, RunConfig) or not isinstance(optimizers, dict):
        raise ConfigError([f"{path}: must define `config`, a RunConfig, and may define `optimizers`, a dict"])
    kinds = typing.get_args(OptimizerConfig)
    wrong = [f"{path}: optimizers[{k!r}] is no optimizer config" for k, v in optimizers.items() if type(v) not in kinds]
    sections = {
        f.name: f.default_factory for f in dataclasses.fields(config) if f.name in SECTIONS and f.name != "optim"
    }
    wrong += [f"{path}: {k} must be a {c.__name__}" for k, c in sections.items() if type(getattr(config, k)) is not c]
    if wrong:
        raise ConfigError(wrong)
    return config, optimizers


def _configs_in(folder: Path) -> list[Path]:
    """The config files of a folder, by name."""
    return sorted(p for p in folder.glob("*.py") if b"\nconfig = " in p.read_bytes())
