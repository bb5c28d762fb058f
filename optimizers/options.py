"""Settings declared once: a default, its meaning, and the values it may take.

Every package of the repository declares its settings as a dataclass whose fields are made by `option`. The command
line, `--help`, the checks, and the question whether a continued run may change a setting all read this declaration.
The module lives in this folder because the folder can be installed and used on its own.
"""

import math
import types
import typing
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Option:
    """A declared setting: which values it may take, and what it means."""

    help: str
    least: float | None  # smallest allowed value
    above: float | None  # values must be larger than this
    most: float | None  # largest allowed value
    below: float | None  # values must be smaller than this
    free_on_resume: bool  # a continued run may change it
    run_only: bool  # decides how a run groups its parameters; a parameter group does not have it
    # from the annotation of the field
    kind: type = object  # of the value, of each number of a tuple, or of each choice
    length: int | None = None  # of a tuple
    several: bool = False  # the value is a list of such tuples, or one of the choices
    choices: tuple[str, ...] = ()  # empty: any value of the kind
    may_be_none: bool = False

    def annotated(self, hint: Any) -> "Option":
        """This declaration with what the annotation of a field says.

        That is `X`, `tuple[X, X]` or `Literal[...]`, each alone or with None, or a list of tuples beside choices,
        `Literal[...] | tuple[tuple[X, X], ...]`.
        """
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        hints = typing.get_args(hint) if union else (hint,)
        literals = [h for h in hints if typing.get_origin(h) is typing.Literal]
        choices = typing.get_args(literals[0]) if literals else ()
        (hint,) = [h for h in hints if h is not type(None) and h not in literals] or [str]
        several = typing.get_args(hint)[1:] == (...,)
        if several:
            hint = typing.get_args(hint)[0]
        numbers = typing.get_args(hint)
        kind, length = (numbers[0], len(numbers)) if numbers else (hint, None)
        may_be_none = type(None) in hints
        return replace(self, kind=kind, length=length, several=several, choices=choices, may_be_none=may_be_none)

    def allows(self, value: object) -> bool:
        """Whether a value has the declared type and lies inside the declared range."""
        if value is None:
            return self.may_be_none
        if self.several and isinstance(value, tuple | list):
            return bool(value) and all(map(self._allows_tuple, value))
        if self.choices:
            return value in self.choices
        return self._allows_one(value) if self.length is None else self._allows_tuple(value)

    def _allows_tuple(self, value: object) -> bool:
        return isinstance(value, tuple | list) and len(value) == self.length and all(map(self._allows_one, value))

    def _allows_one(self, value: object) -> bool:
        if self.kind is float:
            return isinstance(value, Real) and not isinstance(value, bool) and self._in_range(float(value))
        return type(value) is self.kind and (not isinstance(value, int) or self.kind is bool or self._in_range(value))

    def _in_range(self, number: float) -> bool:
        """NaN and infinity are in no range."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    @property
    def description(self) -> str:
        """What a value must be, in words: "a whole number of at least 1", "one of adamw, lion"."""
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
        name = f"one of {', '.join(self.choices)}" if self.choices else names[self.kind]
        if self.several:
            return f"{name}, or one or more groups of {self.length} finite numbers{self.range}"
        if self.length:
            name = f"{self.length} numbers"
        return name + (self.range if self.kind in (int, float) else "") + (" or none" if self.may_be_none else "")

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


def options_of(cls: Any) -> dict[str, Option]:
    """The declared options of a dataclass, by name."""
    if cls not in _known_options:  # an optimizer asks at every step, and type hints are slow to read
        hints = typing.get_type_hints(cls)
        declared = {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}
        _known_options[cls] = {name: o.annotated(hints[name]) for name, o in declared.items()}
    return _known_options[cls]


_known_options: dict[Any, dict[str, Option]] = {}


def errors_of(settings: Any) -> list[str]:
    """The values of a settings object that its declaration does not allow, one line each."""
    values = {key: (getattr(settings, key), declared) for key, declared in options_of(type(settings)).items()}
    return [f"{key}={v!r}: must be {o.description}" for key, (v, o) in values.items() if not o.allows(v)]
