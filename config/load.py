"""From a config file and `--key=value` overrides to a checked RunConfig.

A config file is an ordinary Python module that defines `config`, a RunConfig, and may define `optimizers`, a dict from
names to optimizer settings. A key is given in full (`--schedule.min_lr=1e-5`) or by its last part where that is unique
(`--min_lr=1e-5`).
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.schema import ALTERNATIVES, SECTIONS, RunConfig, all_keys, free_keys
from optimizers import OPTIMIZERS, Settings
from optimizers.options import Option, description
from runtime.command import parse_number

PATHS = ("data.path", "data.hellaswag", "log.folder")


class ConfigError(ValueError):
    """All errors of a configuration, one a line."""

    names_itself = True  # every line starts with "config:"

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(f"config: {error}" for error in errors))


def load_config(path: str | Path, overrides: Sequence[str] = (), as_published: bool = False) -> RunConfig:
    """Read a config file, apply `--key=value` overrides, and check the result.

    as_published: start from what the official MARS and MARS-M runs did (see config/published.py).
    Raises ConfigError with every error found.
    """
    path = Path(path).expanduser()
    config, optimizers = _read_module(path)
    config = dataclasses.replace(config, size=config.size or path.stem)
    given, errors = _split(overrides)

    name = given.pop("optimizer", config.optimizer) or ""
    settings = OPTIMIZERS | optimizers
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=3, cutoff=0.4) or sorted(settings)
        errors.append(f'optimizer="{name}": unknown; nearest: {", ".join(near)}')
        name = "adamw"  # to check the rest
    config = dataclasses.replace(config, optimizer=name, optim=settings[name])
    if as_published:
        from config.published import published

        config = published(config)

    keys = all_keys(config)
    changes: dict[str, Any] = {}
    for key, text in given.items():
        found, error = _resolve(key, keys)
        if error is None:
            try:
                changes[found] = parse(text, *keys[found])
            except ValueError as problem:
                error = f"--{key}: {problem}" if text is None else f"{key}={text}: {problem}"
        if error is not None:
            errors.append(error)
    for pair in ALTERNATIVES:  # saying one of two alternatives withdraws the other
        for key, other in (pair, pair[::-1]):
            if key in changes and other not in changes:
                changes[other] = None
    config = apply(config, changes)
    errors += config.errors()
    if errors:
        raise ConfigError(errors)
    expanded = {key: os.path.expanduser(_get(config, key)) for key in PATHS}  # no shell expands --key=~/folder
    config = apply(config, expanded)
    return dataclasses.replace(config, name=config.name or run_name(config, changes, as_published))


def apply(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A RunConfig with dotted keys changed."""
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        if section:
            value, last = dataclasses.replace(getattr(config, section), **{last: value}), section
        config = dataclasses.replace(config, **{last: value})
    return config


def _get(config: RunConfig, key: str) -> Any:
    section, _, last = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, last)


def run_name(config: RunConfig, changes: dict[str, Any], as_published: bool) -> str:
    """size-optimizer-dataset-budget and every override that changes the result, so that runs do not collide."""
    dataset = Path(config.data.path).name
    parts = [config.size, config.optimizer, dataset, short_count(config.total_steps * config.tokens_per_step)]
    parts += ["published"] if as_published else []
    already_named = {"steps", "tokens", "data.path", *free_keys()}
    for key, value in changes.items():
        if key not in already_named and value is not None:
            text = "x".join(f"{v:g}" for v in value) if isinstance(value, tuple) else _text(value)
            parts.append(f"{key.rpartition('.')[2]}{text}")
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(parts))


def short_count(n: int) -> str:
    """12345678 -> "12.3M"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """A RunConfig as plain nested dicts, for JSON."""
    return dataclasses.asdict(config)


def describe_keys(config: RunConfig) -> str:
    """Every key with its present value and its meaning, one a line."""
    keys = all_keys(config)
    top_first = sorted(keys, key=lambda key: "." in key)
    return "\n".join(f"  --{key}={_text(_get(config, key))}  {keys[key][1].help}" for key in top_first)


def parse(text: str | None, kind: Any, declared: Option) -> Any:
    """Read a command-line value as its declared type; ValueError says what was expected.

    A switch needs no value. "none" and "auto" are None where that is allowed. Numbers may end in k, M or B.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    expected = f"expected {description(kind, declared)}"
    if text is None:
        if kind is not bool:
            raise ValueError("expected --key=value")
        return True
    if type(None) in options and text.lower() in ("none", "auto"):
        return None
    kind = next(k for k in options if k is not type(None))
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(expected)
        return text.lower() in ("true", "1")
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if choice == text.lower()), text)
    if typing.get_origin(kind) is tuple:
        parts, inner = text.strip("()[] ").split(","), typing.get_args(kind)
        if len(parts) != len(inner):
            raise ValueError(f"{expected}, for example 0.9,0.95")
        return tuple(_number(part, k, expected) for part, k in zip(parts, inner, strict=True))
    return _number(text, kind, expected)


def _number(text: str, kind: type, expected: str) -> int | float:
    try:
        value = parse_number(text.strip())
    except ValueError:
        raise ValueError(expected) from None
    if kind is int and value != value // 1:
        raise ValueError(expected)
    return kind(value)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """`--key=value` and `--key` arguments as a dict, and what could not be read as one."""
    given: dict[str, str | None] = {}
    errors = []
    for argument in overrides:
        match = re.fullmatch(r"--([\w.-]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            key = match.group(1).replace("-", "_")
            given.pop(key, None)  # the last one counts
            given[key] = match.group(2)
        else:
            errors.append(f"{argument}: expected --key=value")
    return given, errors


def _resolve(key: str, keys: dict[str, Any]) -> tuple[str, str | None]:
    """The dotted key meant by `key`, or what is wrong with it."""
    old_names = {old: f"{s}.{new}" for s, c in SECTIONS.items() for old, new in getattr(c, "old_names", {}).items()}
    if renamed := old_names.get(key.rpartition(".")[2]):
        print(f'note: "{key}" is now called "{renamed}"', file=sys.stderr)
        key = renamed
    if key in keys:
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


def _read_module(path: Path) -> tuple[RunConfig, dict[str, Settings]]:
    """Import a config file under a private name and take its two definitions."""
    if not path.is_file() or path.suffix != ".py":
        near = _configs_in(path if path.is_dir() else path.parent) or _configs_in(Path(__file__).parent)
        reason = "a folder, not a config file" if path.is_dir() else "no such config file"
        raise ConfigError([f"{path}: {reason}; there are: {', '.join(map(str, near))}"])
    spec = importlib.util.spec_from_file_location(f"_config_file_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError([f"{path}: {type(error).__name__}: {error}"]) from None
    config, optimizers = getattr(module, "config", None), getattr(module, "optimizers", {})
    if not isinstance(config, RunConfig) or not isinstance(optimizers, dict):
        raise ConfigError([f"{path}: must define `config`, a RunConfig, and may define `optimizers`, a dict"])
    wrong = [
        f"{path}: optimizers[{name!r}] must be the settings of an optimizer"
        for name, settings in optimizers.items()
        if not isinstance(settings, Settings)
    ]
    wrong += [
        f"{path}: {section} must be a {cls.__name__}"
        for section, cls in SECTIONS.items()
        if cls is not None and type(getattr(config, section)) is not cls
    ]
    if wrong:
        raise ConfigError(wrong)
    return config, optimizers


def _configs_in(folder: Path) -> list[Path]:
    """The config files of a folder, by name."""
    return sorted(p for p in folder.glob("*.py") if b"\nconfig = " in p.read_bytes())
