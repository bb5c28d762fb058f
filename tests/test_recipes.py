"""The recipes of docs/recipes.md run as printed, on a small model of Transformers."""

import re
import sys

import pytest
import torch
from conftest import ROOT

import optimizers
from optimizers import MARSM

PAGE = (ROOT / "docs/recipes.md").read_text()


def recipe(library: str) -> str:
    """The first code of the page that imports a library."""
    return next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"from {library} import" in c)


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What every recipe is given: model, dataset, batches. It runs in an empty folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setitem(sys.modules, "mars_optimizers", optimizers)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=64, bos_token_id=0, eos_token_id=0)
    rows = [dict(input_ids=x, labels=x) for x in torch.randint(64, (64, 16))]
    return dict(model=GPT2LMHeadModel(config), dataset=rows, batches=torch.utils.data.DataLoader(rows, batch_size=8))


def run(library: str, names: dict, **changes: str) -> dict:
    """Run a recipe with some numbers changed, so that it ends soon; returns its variables."""
    code = recipe(library)
    for old, new in changes.items():
        assert f"{old}=" in code
        code = re.sub(rf"\b{old}=\w+", f"{old}={new}", code)
    names = {"__name__": "recipe"} | names
    exec(compile(code, "docs/recipes.md", "exec"), names)
    return names


def test_the_trainer_of_transformers_moves_the_rates_and_resumes_bit_for_bit(given, capsys):
    short = dict(max_steps="6", warmup_steps="2", save_steps="3")
    before = {n: p.clone() for n, p in given["model"].state_dict().items()}
    names = run("transformers", given, **short)
    assert "transformer.wte.weight" in capsys.readouterr().out
    optimizer, trained = names["optimizer"], {n: p.clone() for n, p in names["model"].state_dict().items()}
    assert {g["role"]: g["initial_lr"] for g in optimizer.param_groups} == dict(
        embedding=6e-3, matrix=6e-3, vector=6e-3
    )
    assert all(g["lr"] < 1e-8 for g in optimizer.param_groups)  # the end of the cosine
    assert not torch.equal(before["transformer.h.0.mlp.c_fc.weight"], trained["transformer.h.0.mlp.c_fc.weight"])
    fresh = type(names["model"])(names["model"].config)
    again = names["Trainer"](
        fresh,
        names["settings"],
        train_dataset=names["dataset"],
        optimizers=(MARSM(optimizers.param_groups(fresh), lr=6e-3), None),
    )
    again.train(resume_from_checkpoint="out/checkpoint-3")
    assert all(torch.equal(p, trained[n]) for n, p in fresh.state_dict().items())


def test_accelerate_accumulates_and_saves(given):
    names = run("accelerate", given)
    state = names["optimizer"].optimizer.state
    assert {int(s["step"]) for s in state.values() if "step" in s} == {4}  # 8 batches, two for each step
    saved = torch.load("out/optimizer.bin", weights_only=True)["state"]
    for ours, theirs in zip(state.values(), saved.values(), strict=True):
        assert all(torch.equal(t, theirs[key]) for key, t in ours.items())


def test_lightning_trains(given):
    pytest.importorskip("lightning")
    names = run("lightning", given)
    (optimizer,) = names["trainer"].optimizers
    assert type(optimizer) is MARSM
    assert names["trainer"].global_step == 8
