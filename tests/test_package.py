"""What `pip install .` installs, and what its users see: signatures, docstrings, types, parameter groups."""

import inspect
import re
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
from conftest import ROOT, environment
from torch import nn

import optimizers
from model import GPT, GPTConfig
from optimizers import MARS, MARSM, SOAP, AdEMAMix, Lion, Muon, NorMuon, Shampoo, param_groups
from optimizers.options import options_of

CLASSES = (MARS, MARSM, Muon, Lion, Shampoo, SOAP, AdEMAMix, NorMuon)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

# where a class, like its authors' code, has other defaults than a run
OF_AUTHORS = {
    MARS: dict(lr=3e-3, weight_decay=0.0, weight_decay_1d=0.1),
    MARSM: dict(lr=1e-3, adamw_eps_first=True),
    Muon: dict(lr=2e-2, weight_decay=0.0, adamw_eps_first=True),
    Lion: dict(betas=(0.9, 0.99), weight_decay=0.0),
}


# ---- signatures


@every_class
def test_a_class_spells_every_setting_with_the_type_and_default_of_its_declaration(cls):
    spelled = inspect.signature(cls).parameters
    hints, options = get_type_hints(cls.settings), options_of(cls.settings)
    settings = {key: hints[key] for key, declared in options.items() if not declared.run_only}
    assert spelled.keys() == {"params", "process_group", "compiled", *settings}
    assert {key: spelled[key].annotation for key in settings} == settings
    defaults = cls.settings().as_group() | OF_AUTHORS.get(cls, {})
    assert {key: spelled[key].default for key in settings} == defaults


@every_class
def test_what_a_class_is_given_reaches_its_groups(cls):
    """By name, and the defaults of the signature where nothing is given."""
    spelled = {k: p.default for k, p in inspect.signature(cls).parameters.items() if k in cls.settings().as_group()}
    other = {k: v * 2 for k, v in spelled.items() if type(v) is float and k in ("lr", "weight_decay")}
    (group,) = cls(nn.Linear(2, 2).parameters(), **other).param_groups
    assert {key: group[key] for key in spelled} == spelled | other


@every_class
def test_the_docstring_of_a_class_explains_every_argument(cls):
    explained = re.findall(r"^    (\w+): \S.+", inspect.getdoc(cls).partition("Arguments:\n")[2], re.MULTILINE)
    assert sorted(explained) == sorted(inspect.signature(cls).parameters)


# ---- parameter groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)


class Language(nn.Module):
    """A model with its output layer defined first, and every kind of parameter."""

    def __init__(self, tied=False):
        super().__init__()
        self.head, self.words = nn.Linear(8, 20), nn.Embedding(20, 8)
        if tied:
            self.head.weight = self.words.weight
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 8, 3)
        self.start = nn.Parameter(torch.zeros(1, 1, 8))


def members(model, groups):
    names = {p: name for name, p in model.named_parameters()}
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


def test_param_groups_finds_embeddings_output_layer_matrices_and_vectors():
    model = Language()
    groups = param_groups(model)
    found = members(model, groups)
    assert found["embeddings"] == {"words.weight"}
    assert found["output layer"] == {"head.weight"}
    attention = {f"blocks.{i}.attention.{name}" for i in (0, 1) for name in ("in_proj_weight", "out_proj.weight")}
    assert found["matrices"] == attention | {"conv.weight"}
    assert found["vectors"] >= {"start", "head.bias", "conv.bias", "blocks.0.norm.weight"}
    assert sorted(name for names in found.values() for name in names) == sorted(dict(model.named_parameters()))
    role = {group["name"]: group["role"] for group in groups}
    assert role == {"embeddings": "embedding", "output layer": "embedding", "matrices": "matrix", "vectors": "vector"}
    assert all(group.get("weight_decay") == (None if group["role"] == "matrix" else 0.0) for group in groups)


def test_a_tied_output_layer_is_an_embedding_and_counts_once():
    model = Language(tied=True)
    found = members(model, param_groups(model))
    assert found["embeddings"] == {"head.weight"}  # its first name
    assert "output layer" not in found


def test_a_model_of_transformers_names_its_output_layer():
    model = Language()
    model.get_output_embeddings = lambda: model.blocks[1].attention.out_proj
    assert members(model, param_groups(model))["output layer"] == {"blocks.1.attention.out_proj.weight"}
    model.get_output_embeddings = lambda: None
    assert "head.weight" in members(model, param_groups(model))["matrices"]


def test_frozen_parameters_are_in_no_group():
    model = Language()
    model.words.requires_grad_(False)
    assert "embeddings" not in members(model, param_groups(model))


def test_the_groups_of_our_gpt_have_the_roles_that_it_declares():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=16))
    names = {p: name for name, p in model.named_parameters()}
    roles = {names[p]: group["role"] for group in param_groups(model) for p in group["params"]}
    assert roles == model.parameter_roles()


@every_class
def test_every_optimizer_takes_the_groups_and_updates_each_by_the_rule_of_its_role(cls):
    model = Language()
    optimizer = cls(param_groups(model), weight_decay=0.5)
    for group in optimizer.param_groups:
        decay = 0.5 if group["role"] == "matrix" else 0.0
        decay = 0.1 if cls is MARS and group["role"] == "vector" else decay  # its weight_decay_1d
        assert {optimizer.rule_of(group, p).weight_decay for p in group["params"]} == {decay}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    optimizer.step()  # SOAP's first step moves no matrix
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_roles_go_before_what_was_found(recwarn):
    model = Language()
    found = members(model, param_groups(model, {"head.weight": "matrix", "conv.weight": "embedding"}))
    assert "head.weight" in found["matrices"]
    assert found["embeddings"] == {"words.weight", "conv.weight"}
    assert not recwarn.list


def test_an_embedding_that_would_be_orthogonalized_is_a_warning():
    with pytest.warns(UserWarning, match=r"words\.weight: an nn\.Embedding has the role of a matrix") as caught:
        param_groups(Language(), {"words.weight": "matrix"})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "roles, message",
    [({"had.weight": "matrix"}, "do not exist: had.weight"), ({"head.weight": "table"}, "unknown roles table")],
)
def test_a_wrong_role_is_an_error(roles, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Language(), roles)


def test_the_table_shows_every_parameter_and_folds_layers(capsys):
    param_groups(Language())
    assert capsys.readouterr().out == ""
    param_groups(Language(), show=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["parameter", "shape", "group", "role"]
    rows = [re.split(r"\s{2,}", line) for line in lines[1:]]
    assert ["head.weight", "20x8", "output layer", "embedding"] in rows
    assert ["blocks.*.attention.in_proj_weight (2)", "24x8", "matrices", "matrix"] in rows
    assert ["start", "1x1x8", "vectors", "vector"] in rows


# ---- the installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package alone, installed from a copy of its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "optimizers", source / "optimizers", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--target", target, source], check=True)
    return target


def python(installed, *words):
    """Run Python where the package is installed and the checkout is not."""
    environ = environment() | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=installed.parent, env=environ, capture_output=True, text=True)


def test_the_wheel_holds_the_folder_under_its_own_name(installed):
    def files(folder):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    assert files(installed / "mars_optimizers") == files(ROOT / "optimizers")
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"mars_optimizers"}


def test_every_module_and_public_name_can_be_imported_without_the_checkout(installed):
    modules = [p.with_suffix("").relative_to(ROOT / "optimizers").parts for p in (ROOT / "optimizers").rglob("*.py")]
    names = [".".join(["mars_optimizers", *module]) for module in modules if module[-1] != "__init__"]
    script = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
from mars_optimizers import {", ".join(optimizers.__all__)}
assert "optimizers" not in sys.modules
"""
    done = python(installed, "-c", script)
    assert done.returncode == 0, done.stderr


PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "docs/optimizers.md")}


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_as_a_user_would_run_it(installed, tmp_path, page):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL) if "from mars_optimizers" in c)
    (tmp_path / "example.py").write_text(code + "\nassert all(p.isfinite().all() for p in model.parameters())\n")
    done = python(installed, tmp_path / "example.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "embeddings" in done.stdout
    assert page == "README.md" or done.stdout in PAGES[page]


USER = """
import torch

from mars_optimizers import MARS, MARSM, SOAP, AdEMAMix, Lion, Muon, NorMuon, Shampoo, param_groups

model = torch.nn.Linear(4, 4)
groups = param_groups(model, {"weight": "matrix"}, show=True)
groups[0]["lr"] = 1e-3
optimizers = [
    MARS(groups, lr=3e-3, betas=(0.9, 0.95), mars_type="mars-lion"),
    MARSM(model.parameters(), 1e-3, 0.1),
    Muon(model.named_parameters(), lr=2e-2, nesterov=False, scale="original"),
    *(Lion(groups), Shampoo(groups), SOAP(groups, refresh_every=5), AdEMAMix(groups, alpha=2.0)),
    NorMuon(groups, beta2=0.9),
]
for optimizer in optimizers:
    loss: float | None = optimizer.step()
    optimizer.zero_grad()

Muon(groups, nesterow=True)  # type: ignore[call-arg]
Lion(groups, betas=0.9)  # type: ignore[arg-type]
MARS(groups, mars_type="mars-adam")  # type: ignore[arg-type]
SOAP(groups, refresh_every="ten")  # type: ignore[arg-type]
AdEMAMix(groups, beta4=0.9)  # type: ignore[call-arg]
Shampoo(model)  # type: ignore[arg-type]
NorMuon(groups, ns_steps=2.5)  # type: ignore[arg-type]
MARSM(groups, scale="moon")  # type: ignore[arg-type]
"""


def test_mypy_checks_every_argument_of_a_user(installed, tmp_path):
    """In strict mode an `ignore` without an error is an error, so each wrong line above must be found.

    What mypy knows of torch is kept between runs, beside the cache of the project, whose settings differ.
    """
    (tmp_path / "user.py").write_text(USER)
    done = python(installed, "-m", "mypy", "--strict", f"--cache-dir={ROOT / '.mypy_cache/user'}", tmp_path / "user.py")
    assert done.returncode == 0, done.stdout + done.stderr
