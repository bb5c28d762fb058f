"""Options that the commands of eval/ share."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from runtime.command import Parser, count


def model_parser(program: str, description: str) -> Parser:
    """A parser with the options of `open_trained`, and the device."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--tokenizer", help="byte, gpt2, a tokenizer.json or a character map; default: the model's own")
    parser.add_argument("--eot", help="token of a tokenizer file that separates documents, if not found by itself")
    parser.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `least`."""

    def whole_number(text: str) -> int:
        if (number := count(text)) < least:
            raise ArgumentTypeError(f"{number}: must be at least {least}")
        return number

    return whole_number
