"""What the commands of eval/ have in common: options that open a model, and one line for what goes wrong."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.hardware import out_of_memory


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--tokenizer and --ranks, as open_trained takes them."""
    parser.add_argument("--tokenizer", choices=("byte", "gpt2"), help="default: the model's own")
    parser.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")


@contextmanager
def one_line(program: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program in one line for Ctrl-C, for what the user can set right, and for a model too large."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{program}: {interrupted}")
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["no more is to be had"])[0]
        sys.exit(f"{program}: out of memory with the model alone; use --device cpu ({reason})")
