"""Optimizers of others, and one written here, under the trainer's clipping, its check for NaN, and its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, finish, launch
from safetensors.torch import load_file
from torch import nn

import train_gpt
from config.load import load_config
from optimizers import OPTIMIZERS
from optimizers.state import load_named_state, named_state, state_bytes, state_problem
from training.clipping import NonFiniteError
from training.logger import read_metrics

FINAL = "run/checkpoints/step_0000012/model.safetensors"

FOREIGN = """
import dataclasses
from dataclasses import dataclass
import importlib.util
from pathlib import Path
import torch
from optimizers import Settings
from optimizers.options import option

spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
config = dataclasses.replace(tiny.config, grad_clip=0.5)

def params(assignments):
    return [a.param for a in assignments]

@dataclass(frozen=True)
class Foreign(Settings):
    lr: float = option(1e-2, "peak learning rate", least=0)
    kind: str = option("sgd", "which class of torch.optim")

    def build(self, assignments, process_group=None, compiled=False):
        if self.kind == "muon":  # only matrices; the rest stays as it is
            for a in assignments:
                a.param.requires_grad_(a.role == "matrix")
            return torch.optim.Muon([a.param for a in assignments if a.role == "matrix"], lr=self.lr)
        make = dict(
            sgd=lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9),
            unfused=lambda p: torch.optim.AdamW(p, lr=self.lr, foreach=False),
            fused=lambda p: torch.optim.AdamW(p, lr=self.lr, fused=True),
            adafactor=lambda p: torch.optim.Adafactor(p, lr=self.lr),
        )
        return make[self.kind](params(assignments))

optimizers = {{kind: Foreign(kind=kind) for kind in ("sgd", "unfused", "fused", "muon", "adafactor")}}
"""
KINDS = ("sgd", "unfused", "fused", "muon", "adafactor")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "foreign.py"
    path.write_text(FOREIGN.format(tiny=str(CONFIG)))
    return path


def words(config: Path, dataset: Path, folder: Path, *more: str) -> list[str]:
    return [str(config), f"--data.path={dataset}", f"--log.folder={folder}", "--name=run", *more]


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in r}


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_optimizers_train_clipped_and_continue_bit_for_bit(foreign, dataset, tmp_path, kind):
    """The first step against the same class in a loop written out here, then a stop at step 8 and a new start."""
    train_gpt.main(words(foreign, dataset, tmp_path / "one", f"--optimizer={kind}", "--dropout=0"))
    train_gpt.main(words(foreign, dataset, tmp_path / "two", f"--optimizer={kind}", "--dropout=0"))
    shutil.rmtree((tmp_path / "two" / FINAL).parent)
    train_gpt.main(words(foreign, dataset, tmp_path / "two", f"--optimizer={kind}", "--dropout=0"))
    one, two = load_file(tmp_path / "one" / FINAL), load_file(tmp_path / "two" / FINAL)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    table = (tmp_path / "one" / "run" / "parameters.txt").read_text()
    assert {"unfused": "AdamW", "fused": "AdamW", "sgd": "SGD"}.get(kind, kind.capitalize()) in table


def test_clipping_reaches_an_optimizer_that_knows_nothing_of_it(foreign, dataset, tmp_path):
    """The first step of SGD moves by lr times the clipped gradient, whose norm is 0.01 here."""
    run = load_config(foreign, words(foreign, dataset, tmp_path, "--optimizer=sgd", "--grad_clip=0.01")[1:])
    t = train_gpt.Trainer(run, train_gpt.World(0, 1, torch.device("cpu")), fresh=False)
    t.begin()
    t.log.close()
    before = [p.detach().clone() for p in t.model.parameters()]
    for group in t.optimizer.param_groups:
        group["lr"] = 1.0
    _, norm = t.gradients(t.next_batch())
    t.update()
    moved = torch.stack([(p - b).norm() for p, b in zip(t.model.parameters(), before, strict=True)]).norm()
    assert norm > 0.1
    torch.testing.assert_close(moved, torch.tensor(0.01), atol=1e-6, rtol=1e-4)


def test_the_state_of_a_first_step_is_known_on_a_machine_with_a_gpu(monkeypatch):
    """There, torch's check before a step reads a key that Adafactor lacks, unless an object has this mark."""

    def check(self):
        assert self._warned_capturable_if_run_uncaptured

    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, check, raising=False)
    model = nn.Linear(8, 4)
    assert state_bytes(torch.optim.Adafactor(model.parameters())) > 0
    assert state_problem(torch.optim.Adafactor(model.parameters()), model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_gradient_stops_before_the_update(foreign, dataset, tmp_path, kind):
    run = load_config(foreign, words(foreign, dataset, tmp_path, f"--optimizer={kind}")[1:])
    t = train_gpt.Trainer(run, train_gpt.World(0, 1, torch.device("cpu")), fresh=False)
    t.begin()
    t.log.close()
    t.accumulate(t.next_batch(), 0)
    next(p for p in t.model.parameters() if p.grad is not None).grad[0] = float("nan")
    before = [p.detach().clone() for p in t.model.parameters()]
    with pytest.raises(NonFiniteError, match="step 0 .* is not finite; earlier checkpoints are good"):
        t.clipper.clip(0)
        t.update()
    assert all(torch.equal(p, b) for p, b in zip(t.model.parameters(), before, strict=True))


def test_a_foreign_optimizers_run_continues_on_two_processes(foreign, dataset, tmp_path):
    arguments = words(foreign, dataset, tmp_path, "--optimizer=adafactor", "--dropout=0")
    train_gpt.main(arguments)
    reference = load_file(tmp_path / FINAL)
    shutil.rmtree((tmp_path / FINAL).parent)
    assert "continuing at step 8" in finish(launch(arguments, 2))
    for name, weights in load_file(tmp_path / FINAL).items():
        torch.testing.assert_close(weights, reference[name], atol=2e-5, rtol=1e-3)


# ---- state of every kind


class Odd(torch.optim.Optimizer):
    """Keeps a tensor of another shape, a Python int, an int64 tensor and a bool."""

    kept: object = None

    def __init__(self, params):
        super().__init__(params, dict(lr=0.1))

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            if not s:
                s |= dict(rows=torch.zeros(p.shape[0], 2), steps=0, seen=torch.zeros((), dtype=torch.int64), on=True)
                s |= {"kept": self.kept} if self.kept is not None else {}
            s["rows"] += p.grad.sum()
            s["steps"] += 1
            s["seen"] += 2


def test_numbers_and_tensors_of_any_shape_and_type_come_back():
    model = nn.Linear(3, 4)
    optimizer, other = Odd(model.parameters()), Odd(model.parameters())
    assert state_problem(optimizer, model) is None
    assert not optimizer.state
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = named_state(optimizer, model)
    assert {"weight/rows", "weight/steps#int", "weight/seen", "weight/on#bool"} <= saved.keys()
    load_named_state(other, model, saved)
    for p in model.parameters():
        assert (other.state[p]["steps"], other.state[p]["on"]) == (1, True)
        assert other.state[p]["seen"].dtype == torch.int64
        assert torch.equal(other.state[p]["rows"], optimizer.state[p]["rows"])


def test_state_that_cannot_be_kept_is_refused_by_name_before_the_first_step():
    class Worse(Odd):
        kept = "a text"

    model = nn.Linear(3, 4)
    assert state_problem(Worse(model.parameters()), model) == 'the state "kept" of weight is a str' or (
        state_problem(Worse(model.parameters()), model) == 'the state "kept" of bias is a str'
    )


def test_the_room_for_lazily_allocated_state_is_known_before_the_first_step():
    model = nn.Linear(64, 32)
    adam = torch.optim.Adam(model.parameters())
    assert state_bytes(adam) == 8 * sum(p.numel() for p in model.parameters())


# ---- a new optimizer is one small file


TOY = """
from dataclasses import dataclass
from typing import NamedTuple
from optimizers import Settings, register
from optimizers.composed import ComposedOptimizer
from optimizers.directions import Direction
from optimizers.options import option
from optimizers.settings import Rule
from tests.tiny_config import config

class Numbers(NamedTuple):
    rate: float
    weight: float

@dataclass(frozen=True)
class Average(Direction):
    beta: float
    label, state_names = "average", ("average",)
    def numbers(self, step):
        return Numbers(step.lr, 1 - self.beta)
    @staticmethod
    def update(p, gradient, state, n):
        p.sub_(state[0].lerp_(gradient, n.weight) * n.rate)

@dataclass(frozen=True)
class ToyConfig(Settings):
    lr: float = option(0.5, "peak learning rate", least=0)
    beta: float = option(0.9, "decay of the average", least=0, below=1)
    weight_decay: float = option(0.0, "not used", least=0)
    def rule(self, role, lr_factor):
        return Rule(Average(self.beta), self.lr, 0.0)

class Toy(ComposedOptimizer):
    settings = ToyConfig

optimizers = {"toy": register(Toy, ToyConfig())}
"""


def test_a_toy_optimizer_trains_resumes_and_is_clipped(dataset, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    assert len(TOY[TOY.index("class Numbers") :].strip().splitlines()) < 30
    for name in ("one", "two"):
        train_gpt.main(words(tmp_path / "toy.py", dataset, tmp_path / name, "--optimizer=toy", "--beta=0.8"))
    shutil.rmtree((tmp_path / "two" / FINAL).parent)
    train_gpt.main(words(tmp_path / "toy.py", dataset, tmp_path / "two", "--optimizer=toy", "--beta=0.8"))
    one, two = load_file(tmp_path / "one" / FINAL), load_file(tmp_path / "two" / FINAL)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "one")[12] < losses(tmp_path / "one")[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_registry_trains_and_resumes(dataset, tmp_path, name):
    for folder in ("one", "two"):
        train_gpt.main(words(CONFIG, dataset, tmp_path / folder, f"--optimizer={name}"))
    shutil.rmtree((tmp_path / "two" / FINAL).parent)
    train_gpt.main(words(CONFIG, dataset, tmp_path / "two", f"--optimizer={name}"))
    one, two = load_file(tmp_path / "one" / FINAL), load_file(tmp_path / "two" / FINAL)
    assert all(torch.equal(one[key], two[key]) for key in one)
