"""Options that every command of eval/ shares."""

from runtime.command import Parser


def model_parser(program: str, description: str) -> Parser:
    """A parser with the options that `open_trained` takes, and the device."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--tokenizer", choices=("byte", "gpt2"), help="default: the model's own")
    parser.add_argument("--ranks", help="local GPT-2 ranks file, for machines without a network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser
