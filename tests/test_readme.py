"""What the README and docs/ say exists: files, commands, options, keys, optimizers, and code that runs."""

import importlib
import re
import shlex
from contextlib import suppress

import pytest
from conftest import ROOT

from config.load import load_config
from optimizers import OPTIMIZERS
from training.run_config import all_keys

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
CONFIG = ROOT / "config" / "gpt2_small.py"
pages = pytest.mark.parametrize("page", PAGES)


def commands(text: str) -> list[list[str]]:
    """The commands of a page, from its shell blocks and from its tables, as words without comments."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|bash|torchrun) [^`]+)`", text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page, words) for page, text in PAGES.items() for words in commands(text)]


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of the trainer, with and without its section."""
    known = set()
    for optimizer in OPTIMIZERS:
        dotted = all_keys(load_config(CONFIG, [f"--optimizer={optimizer}"]))
        known |= {*dotted, *(key.rpartition(".")[2] for key in dotted)}
    return known


def help_of(module: str, words: list[str], capsys) -> str:
    """The help text of a command."""
    path = ROOT / module.replace(".", "/")
    name = f"{module}.command" if path.is_dir() else module
    subcommand = words[:1] if path.is_dir() else []
    with suppress(SystemExit):
        importlib.import_module(name).main([*subcommand, "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    return text


@pages
def test_every_link_and_path_is_there(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page]):
        assert (folder / target).exists(), target
    for path in re.findall(
        r"`((?:bench|config|data|docs|eval|experiments|optimizers|runtime|scripts|tests|training)/[\w./]*)`",
        PAGES[page],
    ):
        assert (ROOT / path).exists() or path.startswith("data/tokens"), path


def test_the_map_names_every_room():
    rooms = set(re.findall(r"^\| `(\w+/|\w+\.py)` \|", README, re.MULTILINE))
    assert rooms >= {
        "train_gpt.py",
        "model.py",
        "optimizers/",
        "config/",
        "data/",
        "runtime/",
        "training/",
        "eval/",
        "bench/",
        "experiments/",
    }
    assert all((ROOT / room).exists() for room in rooms)


def test_every_page_of_docs_is_linked():
    for page in PAGES.keys() - {"README.md"}:
        assert f"]({page})" in README, page


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_every_command_and_its_options_exist(page, words, keys, capsys):
    if "-m" in words:
        module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        text = help_of(module, rest, capsys)
        for option in re.findall(r"(--[a-z_]+)", " ".join(rest)):
            assert option in text, option
    elif "train_gpt.py" in words:
        rest = words[words.index("train_gpt.py") + 1 :]
        text = help_of("train_gpt", [], capsys)
        own = [word for word in rest[1:] if re.match(r"--(help|preflight|as)\b", word)]
        assert all(word.partition("=")[0] in text for word in own), words
        load_config(ROOT / rest[0], [word for word in rest[1:] if word not in own])
    elif words[0] in ("bash", "sbatch"):
        script = next(word for word in words if word.startswith("scripts/"))
        text = (ROOT / script).read_text() + (ROOT / "scripts/train.sh").read_text()
        for option in re.findall(r"(?<![\w-])--([a-z-]+)", " ".join(words[1:]).partition(" -- ")[0]):
            assert f"--{option}" in text or option == "nodes" or option in keys, option
    else:
        assert words[0] in ("python", ".venv/bin/python", "torchrun"), words
        program = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / program).exists() or f"Save this as `{program}`" in PAGES[page], words


@pages
def test_every_trainer_key_is_in_the_schema(page, keys):
    other = {"key", "nproc_per_node", "tokens_per_s", "batch_tokens", "optimizer"}
    named = {key.rstrip(".") for key in re.findall(r"`--([a-z_0-9.]+)=", PAGES[page])} - other
    assert named <= keys


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_in_the_table(name):
    assert f"`{name}" in PAGES["docs/optimizers.md"]
    assert load_config(CONFIG, [f"--optimizer={name}"]).optimizer == name


def test_the_page_has_the_learning_rates_of_the_config_files():
    header, *rows = re.findall(
        r"^\| (.+) \|$", PAGES["docs/optimizers.md"].split("## Which learning rate")[1], re.MULTILINE
    )
    names = [cell.strip("`") for cell in header.split(" | ")[2:]]
    assert len(rows) == 4
    for row in rows:
        size, width, *rates = row.split(" | ")
        configs = [
            load_config(ROOT / f"config/gpt2_{size.partition(',')[0]}.py", [f"--optimizer={name}"]) for name in names
        ]
        assert {c.model.n_embd for c in configs} == {int(width)}
        assert [c.optim.lr for c in configs] == [float(rate) for rate in rates]


def test_no_paragraph_of_the_readme_is_longer_than_five_lines():
    for paragraph in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        lines = [line for line in paragraph.splitlines() if not line.startswith(("|", "- ", "  ", "#"))]
        assert len(lines) <= 5, paragraph


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    code = "\n".join(
        p.read_text() for room in ("runtime", "training", "data", "optimizers") for p in ROOT.glob(f"{room}/**/*.py")
    )
    symptoms = re.findall(r"^\| (.+?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    quoted = {text for symptom in symptoms for text in re.findall(r"`([^`]+)`", symptom)}
    of_others = {"address already in use", "torchrun", "data_ms", "metrics.jsonl"}
    for message in quoted - of_others:
        for part in message.split(" N "):
            assert part in code, part
