"""What all commands share: how options are spelled, and one line for what goes wrong."""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Parser(argparse.ArgumentParser):
    """An argument parser that reads `--an-option` as `--an_option`, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args([spelled(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {message}; --help lists the options")


def spelled(argument: str) -> str:
    """An argument whose option, if it is one, is written with underscores."""
    key, equals, value = argument.partition("=")
    return key.replace("-", "_").replace("__", "--", 1) + equals + value if re.match(r"--\w", argument) else argument


def parse_number(text: str) -> int | float:
    """A number as people write it: "480", "6e-4", "0.5M", "10B". Raises ValueError for anything else."""
    scale = UNITS.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    try:
        value: int | float = int(number)
    except ValueError:
        value = float(number)
    value *= scale
    return int(value) if scale > 1 and math.isfinite(value) and value == int(value) else value


def count(text: str) -> int:
    """A whole number as people write it, "10B" or "1e9"; for argparse."""
    value = parse_number(text)
    if value != value // 1:
        raise ValueError(text)
    return int(value)


def join_values(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`--key value` as `--key=value`. A flag takes no value, and neither does a key before another option or a
    config file."""
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
    """Whether an exception says that memory is short, on a GPU or on the host."""
    import torch

    text = str(error)
    signs = (
        "can't allocate memory",  # torch on the host
        "Storage size calculation overflowed",
        "CUDA error: out of memory",  # torch.AcceleratorError
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "Failed to CUDA calloc",  # NCCL
        "Triton Error [CUDA]: out of memory",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in signs)


@contextmanager
def one_line(program: str, interrupted: str = "interrupted", memory: str = "use a smaller model") -> Iterator[None]:
    """End the program in one line for Ctrl-C, for what the user can set right, and for too little memory.

    memory: what to do when memory is short.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{program}: {interrupted}")
    except (ValueError, ImportError, OSError) as error:
        sys.exit(str(error) if getattr(error, "names_itself", False) else f"{program}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no memory left"])[0]
        sys.exit(f"{program}: out of memory; {memory} ({reason})")
