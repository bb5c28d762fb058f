"""Owners compute: the same weights on any number of processes, and checkpoints that fit any number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, launch
from forked import Forked
from safetensors.torch import load_file
from torch import nn

from config.load import load_config
from model import GPT
from optimizers import OPTIMIZERS, MARSConfig, MARSMConfig, MuonConfig, NorMuonConfig, build_optimizer
from optimizers.directions import MatrixDirection, summed
from optimizers.matrices import families
from optimizers.newton_schulz import Orthogonal
from optimizers.owners import Replicated
from optimizers.state import load_named_state, named_state, state_bytes
from runtime.distributed import start_world
from training.checkpoint import CheckpointConfig, Checkpointer

CONFIGS = {name: settings for name, settings in OPTIMIZERS.items() if name != "adamw"} | {  # without torch's own
    "muon": MuonConfig(split_qkv=True),
    "mars_m_exact": MARSMConfig(is_approx=False),
    "mars_m_one_buffer": MARSMConfig(clip_c=False),
    "normuon_heads": NorMuonConfig(split_heads=2),
    "muon_polar_express": MuonConfig(coefficients="polar_express"),
    "mars_m_cautious": MARSMConfig(weight_decay_kind="cautious", adamw_weight_decay=0.1),
    "mars_shampoo": MARSConfig(mars_type="mars-shampoo", optimize_1d=True),
}


class Odd(nn.Module):
    """Wide and tall matrices, one square matrix (fewer than ranks), a frozen one, a table, a gain.

    One matrix and one gain get their first gradient in the sixth step.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {f"m{i}": (8, 24) if i % 2 else (24, 8) for i in range(5)}
        shapes |= {"square": (8, 8), "frozen": (8, 24), "table": (16, 8), "gain": (8,)}
        shapes |= {"late": (8, 24), "late_gain": (8,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.frozen.requires_grad = False
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(8, 24, bias=False)})  # split by name

    def parameter_roles(self):
        special = {"table": "embedding", "gain": "vector", "late_gain": "vector"}
        return {n: special.get(n, "matrix") for n, p in self.named_parameters() if p.requires_grad}


def take_steps(model, optimizer, start, stop):
    """Steps on gradients that depend on the step number and the name alone, equal on all ranks."""
    for step in range(start, stop):
        for kind in ("ahead", "now") if getattr(optimizer, "needs_lookahead", False) else ("now",):
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                g = torch.Generator().manual_seed(1000 * step + i + 500 * (kind == "ahead"))
                p.grad = torch.randn(p.shape, generator=g)
            if kind == "ahead":
                optimizer.update_previous_grad()
        model.square.grad = None if step % 3 == 2 else model.square.grad  # sometimes without a gradient
        if step < 5:
            model.late.grad = model.late_gain.grad = None
        optimizer.step()
        optimizer.update_last_grad()


def continued(folder: Path, start: int, stop: int) -> None:
    """What each process runs: continue every config's checkpoint from `start` to `stop` and save."""
    with start_world("cpu") as world:
        held = {}
        for name, config in CONFIGS.items():
            model = Odd()
            optimizer = build_optimizer(model, config, world.group)
            held[name] = world.gather(state_bytes(optimizer))
            checkpoints = Checkpointer(folder / name, CheckpointConfig(keep=9), world)
            if start is not None and (found := checkpoints.latest()):
                assert found.state["step"] == start
                model.load_state_dict(found.model())
                load_named_state(optimizer, model, found.optimizer())
            take_steps(model, optimizer, start or 0, stop)
            weights = world.gather({n: p.detach() for n, p in model.named_parameters()})
            assert all(torch.equal(weights[0][n], w[n]) for w in weights for n in w)
            tensors = {n: p.detach() for n, p in model.named_parameters()}
            checkpoints.save(
                tensors,
                named_state(optimizer, model, world.rank),
                dict(step=stop, steps=9, tokens=stop, sequences=stop, config={}),
            )
        if world.is_main:
            (folder / "held.json").write_text(json.dumps(held))


def processes(n: int, folder: Path, start: int, stop: int) -> dict:
    finish(Forked(continued, folder, start, stop, processes=n))
    return json.loads((folder / "held.json").read_text())


def assert_same_checkpoints(a: Path, b: Path, step: int):
    for name in CONFIGS:
        one, two = (load_all(f / name / f"step_{step:07d}") for f in (a, b))
        assert one.keys() == two.keys(), name
        for key in one:
            assert torch.equal(one[key], two[key]), (name, key)


def load_all(checkpoint: Path) -> dict:
    return {k: v for path in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Checkpoints after 4 and after 8 steps in one process."""
    folder = tmp_path_factory.mktemp("single")
    processes(1, folder, 0, 4)
    processes(1, folder, 4, 8)
    return folder


@pytest.mark.parametrize("n", [2, 3, 4])
def test_weights_and_state_are_bitwise_those_of_one_process(n, single, tmp_path):
    held = processes(n, tmp_path, 0, 4)
    assert_same_checkpoints(single, tmp_path, 4)
    for name, (whole,) in json.loads((single / "held.json").read_text()).items():
        if isinstance(CONFIGS[name].rule("matrix", 1.0).direction, MatrixDirection):
            # the state of matrices is divided, and every rank holds that of the table and the gain
            assert max(held[name]) < whole < sum(held[name]), name
        else:  # every rank holds all of it
            assert held[name] == [whole] * n


def test_saved_on_three_and_continued_on_one_and_two(single, tmp_path):
    processes(3, tmp_path / "3", 0, 4)
    for n in (1, 2):
        folder = shutil.copytree(tmp_path / "3", tmp_path / str(n))
        processes(n, folder, 4, 8)
        assert_same_checkpoints(single, folder, 8)


def test_a_checkpoint_before_the_first_step_is_complete(tmp_path, single):
    processes(2, tmp_path, 0, 0)
    for name in CONFIGS:
        saved, later = (load_all(f / name / f"step_{s:07d}") for f, s in ((tmp_path, 0), (single, 4)))
        assert saved.keys() == later.keys()


@pytest.mark.parametrize("optimizer", ["mars_m", "mars"])
def test_training_on_two_processes_equals_one_and_resumes(dataset, tmp_path, optimizer):
    """The trainer's exact form: two gradients a step, owners compute, continued on another number of processes."""
    common = ["tests/tiny_config.py", f"--data.path={dataset}", f"--optimizer={optimizer}", "--name=run"]
    common += ["--is_approx=false", "--dropout=0", "--lr=0.005"]
    one, mixed = f"--log.folder={tmp_path / 'one'}", f"--log.folder={tmp_path / 'mixed'}"
    finish(launch([*common, one]))
    finish(launch([*common, mixed], processes=2))
    for path in (tmp_path / "mixed/run/checkpoints/step_0000012").iterdir():
        path.unlink()
    assert "continuing at step 8" in finish(launch([*common, mixed]))
    records = [json.loads(line) for line in (tmp_path / "mixed/run/metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["gradient_evaluations"] for r in steps] == [2 * r["step"] for r in steps]
    assert [r["tokens"] for r in steps] == [192 * r["step"] for r in steps]
    final = "run/checkpoints/step_0000012/model.safetensors"
    reference = load_file(tmp_path / "one" / final)
    for name, weights in load_file(tmp_path / "mixed" / final).items():
        torch.testing.assert_close(weights, reference[name], atol=5e-4, rtol=5e-3)


@pytest.mark.parametrize(
    "size, ranks, most", [("xl", 8, 1.01), ("xl", 16, 1.01), ("xl", 64, 1.10), ("small", 16, 1.10), ("small", 64, 1.75)]
)
def test_the_work_on_matrices_is_balanced_over_the_ranks(size, ranks, most, monkeypatch):
    """The largest share of Newton-Schulz's operations, relative to the mean share."""
    with torch.device("meta"):
        model = GPT(load_config(ROOT / "config" / f"gpt2_{size}.py", []).model)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    work = Orthogonal(summed(0.95)).cost
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    ownership = Replicated("a group")
    ownership.assign(families(matrices, 1), lambda p: work(*p.shape))
    shares = [sum(work(*p.shape) for p in matrices if ownership.owner[p] == rank) for rank in range(ranks)]
    assert max(shares) * ranks <= most * sum(shares)
