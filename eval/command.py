"""Options that the commands of eval/ share."""

from runtime.command import Parser


def model_parser(program: str, description: str) -> Parser:
    """A parser with the options of `open_trained`, and the device."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--tokenizer", help="byte, gpt2, a tokenizer.json or a character map; default: the model's own")
    parser.add_argument("--eot", help="token of a tokenizer file that separates documents, if not found by itself")
    parser.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser
