"""The arguments of the optimizer classes: spelled in each `__init__`, explained in the docstring from the settings."""

from inspect import cleandoc
from typing import Any

from .options import options_of

OF_EVERY_CLASS = {
    "params": 'parameters, (name, parameter) pairs, or groups: dicts with "params", "role" and own settings',
    "process_group": "ranks with equal gradients, which share the work on matrices; not for sharded parameters",
    "compiled": "run the elementwise updates through torch.compile",
}


def arguments(names: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `__init__`, from its `locals()`."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def with_arguments(docstring: str | None, settings: type) -> str:
    """The docstring of an optimizer class with a line for each argument, in the words of the class's settings."""
    lines = [f"{name}: {text}" for name, text in OF_EVERY_CLASS.items()]
    for name, o in options_of(settings).items():
        if not o.run_only:
            lines.append(f"{name}: {o.help}" + (f" ({o.range.removeprefix(' of').strip()})" if o.range else ""))
    return "\n    ".join([f"{cleandoc(docstring or '')}\n\nArguments:", *lines])
