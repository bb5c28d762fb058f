"""Settings declared once: a default, its meaning, and the values it may take.

Every package of the repository declares its settings as a dataclass whose fields are made by `option`. The command
line, `--help`, the checks, and the question whether a continued run may change a setting all read this declaration.
The module lives in this folder because the folder can be installed and used on its own.
"""

import math
import types
import typing
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Option:
    """What a declaration says beyond the type and the default of its field."""

    help: str
    least: float | None  # smallest allowed value
    above: float | None  # values must be larger than this
    most: float | None  # largest allowed value
    below: float | None  # values must be smaller than this
    free_on_resume: bool  # a continued run may change it
    run_only: bool  # decides how a run groups its parameters; a parameter group does not have it

    def allows(self, number: float) -> bool:
        """Whether a number lies inside the declared range; NaN and infinity never do."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words, with a leading space: " of at least 1", " above 0", " from 1 to 8", " in [0, 1)"."""
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if self.least is not None and self.most is not None:
            return f" from {self.least:,} to {self.most:,}"
        if low is not None and high is not None:
            return f" in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"
        if low is not None:
            return f" of at least {low:g}" if self.above is None else f" above {low:g}"
        return "" if high is None else f" of at most {high:g}" if self.below is None else f" below {high:g}"


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    on_resume: typing.Literal["fixed", "free"] = "fixed",
    run_only: bool = False,
) -> Any:
    """A field of a settings dataclass. Its type comes from the annotation; `Literal[...]` declares choices.

    on_resume: "free" if a run may be continued with another value.
    run_only: the setting of an optimizer decides how a run groups its parameters, so the optimizer class does not
    accept it.
    """
    declared = Option(help, least, above, most, below, on_resume == "free", run_only)
    return field(default=default, metadata={"option": declared})


def options_of(cls: Any) -> dict[str, tuple[Any, Option]]:
    """The declared options of a dataclass: name to (type, declaration)."""
    if cls not in _known_options:  # an optimizer asks at every step, and type hints are slow to read
        hints = typing.get_type_hints(cls)
        declared = {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}
        _known_options[cls] = {name: (hints[name], o) for name, o in declared.items()}
    return _known_options[cls]


_known_options: dict[Any, dict[str, tuple[Any, Option]]] = {}


def errors_of(settings: Any) -> list[str]:
    """The values of a settings object that its declaration does not allow, one line each."""
    return [
        f"{key}={value!r}: must be {description(kind, declared)}"
        for key, (kind, declared) in options_of(type(settings)).items()
        if not is_allowed(value := getattr(settings, key), kind, declared)
    ]


def is_allowed(value: object, kind: Any, declared: Option) -> bool:
    """Whether a value has the declared type and lies inside the declared range."""
    if isinstance(kind, types.UnionType):
        return any(is_allowed(value, k, declared) for k in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list) or len(value) != len(inner):
            return False
        return all(is_allowed(v, k, declared) for v, k in zip(value, inner, strict=True))
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and declared.allows(float(value))
    if kind is int:
        return type(value) is int and declared.allows(value)
    return type(value) is kind


def description(kind: Any, declared: Option) -> str:
    """What a value must be, in words: "a whole number of at least 1", "one of adamw, lion"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(description(k, declared) for k in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if typing.get_origin(kind) is tuple:
        count = {2: "two", 3: "three"}[len(typing.get_args(kind))]
        return f"{count} numbers{declared.range}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "none"}
    return names[kind] + (declared.range if kind in (int, float) else "")
