"""The common parts of all commands: the spelling of options and numbers, and errors in one line."""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

from runtime.errors import UserError
from runtime.streams import guard_streams, printable

UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
OUT_OF_MEMORY = (  # messages that contain one of these report too little memory
    "can't allocate memory",  # torch in host memory
    "Storage size calculation overflowed",
    "CUDA error: out of memory",  # torch.AcceleratorError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",  # NCCL
    "Triton Error [CUDA]: out of memory",
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and ends the help of an option with its default if the text names none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if default is False or default in (None, argparse.SUPPRESS, "", []) or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})".strip()


class Parser(argparse.ArgumentParser):
    """An argument parser that reads `--an-option` as `--an_option` and reports an error in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        guard_streams()  # early, because the parser may print its help
        super().__init__(*args, **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        return super().parse_known_args([spelled(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def parse_with_settings(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse this parser's options; returns all others as `--key=value`, also if they are given as `--key value`."""
        flags = [name for action in self._actions if action.nargs == 0 for name in action.option_strings]
        return self.parse_known_args(join_values(sys.argv[1:] if argv is None else argv, flags))

    def error(self, message: str) -> NoReturn:
        sys.exit(printable(f"{self.prog}: {message}; --help lists the options"))


def spelled(argument: str) -> str:
    """An option in the spelling with underscores: `--an-option=x-y` as `--an_option=x-y`."""
    key, equals, value = argument.partition("=")
    return "--" + key[2:].replace("-", "_") + equals + value if re.match(r"--\w", argument) else argument


def parse_number(text: str) -> int | float:
    """A number as people write it: "480", "6e-4", "10_000", "0.5M", "10b". An int if it is whole.

    Raises ValueError for other text.
    """
    scale = UNITS.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    number = float(digits)  # the ValueError of other text
    if not math.isfinite(number):
        return number
    exact = Fraction(Decimal(digits)) * scale  # 1.001 times 1000 is not whole in floating point
    if abs(exact) > int(sys.float_info.max):
        return math.inf if exact > 0 else -math.inf
    return int(exact) if exact.denominator == 1 else float(exact)


def count(text: str) -> int:
    """A whole number as people write it, "10B" or "1e9". Raises ValueError for other text."""
    number = parse_number(text)
    if isinstance(number, float):
        raise ValueError(text)
    return number


def short_count(n: int) -> str:
    """12345678 -> "12.3M"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `least`, and not above `most` if that is given."""
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"

    def whole_number(text: str) -> int:
        try:
            number = count(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{number}: must be {allowed}")
        return number

    return whole_number


def join_values(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Write `--key value` as `--key=value`.

    These keys have no value: a flag, and a key before another option or before a config file.
    """
    out: list[str] = []
    for argument in argv:
        previous = out[-1] if out else ""
        is_key = previous.startswith("--") and "=" not in previous and spelled(previous) not in flags
        is_value = not argument.startswith("--") and not argument.endswith(".py")
        if is_key and is_value:
            out[-1] = f"{previous}={argument}"
        else:
            out.append(argument)
    return out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports too little memory, on a GPU or in the host."""
    import torch

    is_known_class = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_known_class or any(part in str(error) for part in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class name."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def is_deliberate(error: BaseException) -> bool:
    """Whether an error is the user's to correct: one that we raise on purpose, or of the system about a file."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)


@contextmanager
def one_line(program: str, interrupted: str = "interrupted", memory: str = "use a smaller model") -> Iterator[None]:
    """End the program with one line after Ctrl-C, an error that the user can correct, or too little memory.

    interrupted: the message after Ctrl-C. memory: the advice when memory is too small.
    Any other error may be a bug, so it keeps its traceback. With TRACEBACK=1 in the environment all errors do.
    Of processes that fail together, only the first one of a machine prints its line, see `_end_program`.
    """
    guard_streams()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK", "0") not in ("", "0"):
            raise
        if isinstance(error, KeyboardInterrupt):
            sys.exit(f"{program}: {interrupted}")
        if is_deliberate(error):
            text = str(error)
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.filename}: {error.strerror}"
            _end_program(text if getattr(error, "names_itself", False) else f"{program}: {text}")
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            _end_program(f"{program}: out of memory; {memory} ({first_line(error)})")
        raise


def _end_program(message: str) -> NoReturn:
    """End the process with a message and exit status 1.

    Under torchrun, all processes of a machine usually fail with the same message. So the first one prints it, and the
    others wait for torchrun, which ends them as soon as one has failed. If the first one has not failed, they print.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    sys.exit(printable(message))
