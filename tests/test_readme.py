"""What the README says exists: files, keys, commands."""

import re

import pytest
from conftest import ROOT

from config.load import load_config
from config.schema import all_keys
from optimizers import OPTIMIZERS

README = (ROOT / "README.md").read_text()
CONFIG = ROOT / "config" / "gpt2_small.py"


def test_every_path_of_the_map_is_there():
    rows = re.findall(r"^\| `(\w+/|\w+\.py)` \|", README, re.MULTILINE)
    assert len(rows) >= 9
    for path in [*rows, *re.findall(r"(?:bash|python) ((?:scripts|config)/[\w./]+|train_gpt\.py)", README)]:
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"\]\((bench/[\w./]+)\)", README):
        assert (ROOT / picture).exists(), picture


def test_every_module_that_is_run_is_there():
    modules = set(re.findall(r"python -m ([a-z_]+\.[\w.]+)", README))
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_trainer_key_is_in_the_schema():
    known = set()
    for optimizer in OPTIMIZERS:
        keys = all_keys(load_config(CONFIG, [f"--optimizer={optimizer}"]))
        known |= {*keys, *(key.rpartition(".")[2] for key in keys)}
    lines = [line for line in README.splitlines() if "train_gpt.py" in line or line.startswith(("|", "`--", "("))]
    named = {key for line in lines for key in re.findall(r"--([a-z_0-9.]+)=", line)}
    named -= {"nproc_per_node", "tokens_per_s"}  # of torchrun and of the preflight
    assert {"optimizer", "lr", "sampling"} <= named
    assert named <= known


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_table_can_be_chosen(name):
    assert f"`{name}" in README
    assert load_config(CONFIG, [f"--optimizer={name}"]).optimizer == name
