"""Every golden optimizer and training case, by the public classes, within the manifest's tolerances."""

import inspect
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from optimizers import (
    MARS,
    MARSM,
    OPTIMIZERS,
    SOAP,
    AdamWConfig,
    Lion,
    MARSConfig,
    MARSMConfig,
    Muon,
    MuonConfig,
    build_optimizer,
)
from optimizers.standalone import mars, mars_m, muon
from optimizers.vectors import main, steps_of

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
INPUTS = dict(np.load(GOLDEN / "optim_inputs.npz"))


def build(case, params):
    """The public class of a case, called with the case's own hyperparameters."""
    h = dict(case["hyperparameters"])
    ns = {"ns_dtype": case["newton_schulz"]["dtype"]} if "newton_schulz" in case else {}
    for key in ("betas", "betas_1d", "adamw_betas"):
        if key in h:
            h[key] = tuple(h[key])
    if case["optimizer"] in ("adamw", "mars", "lion"):
        groups = [{"params": [params[n] for n in g["params"]], "weight_decay": g["weight_decay"]}
                  for g in case["param_groups"]]  # fmt: skip
        return {"adamw": torch.optim.AdamW, "mars": MARS, "lion": Lion}[case["optimizer"]](groups, **h, **ns)
    matrices = {"params": [params[n] for n in case["matrix_params"]], "role": "matrix"}
    others = {"params": [params[n] for n in case["adamw_params"]], "role": "vector"}
    h["weight_decay"] = h.pop("wd", h.get("weight_decay"))
    if case["optimizer"] == "muon":
        aux = h.pop("adamw")
        others |= dict(lr=aux["lr"], weight_decay=aux["weight_decay"])
        return Muon([matrices, others], **h, **ns, scale="original")
    if case["optimizer"] == "moonlight":
        return Muon([matrices, others], **h, **ns, scale="moonlight")
    exact = dict(is_approx=case["mode"] == "approx", clip_c=case["optimizer"] == "mars_m")
    return MARSM([matrices, others], **h, **ns, **exact)


@pytest.mark.parametrize("case", MANIFEST["optimizers"], ids=lambda c: c["id"])
def test_optimizer_follows_the_reference(case):
    params = {n: torch.nn.Parameter(torch.tensor(INPUTS[f"init/{n}"])) for n in MANIFEST["shapes"]}
    check_against_reference(case, build(case, params), params, case["compare"])


def check_against_reference(case, optimizer, params, names):
    """Take the steps of a case and compare the named parameters."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    expected = dict(np.load(GOLDEN / case["file"]))
    checked = 0
    for step in range(1, MANIFEST["steps"] + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (case["lr_factors"][step - 1] if case["lr_factors"] else 1)
        if case["mode"] == "exact":
            give(params, "next_grads", step)
            optimizer.update_previous_grad()
            optimizer.zero_grad(set_to_none=True)
        give(params, "grads", step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if case["mode"] == "exact":
            optimizer.update_last_grad()
        if step in case["snapshots"]:
            for name in names:
                golden, path = expected[f"step{step:02d}/{name}"], float(expected[f"path{step:02d}/{name}"])
                matrix = name in case.get("matrix_params", ()) or (
                    case["hyperparameters"].get("mars_type") == "mars-shampoo" and golden.ndim == 2
                )
                relative = case["tolerance"]["matrix_relative" if matrix else "other_relative"]
                allowed = relative * path + case["tolerance"]["rounding"] * np.linalg.norm(golden)
                assert np.linalg.norm(params[name].detach().numpy() - golden) <= allowed, (step, name)
                checked += 1
    assert checked == len(case["snapshots"]) * len(names)


PAGES = {  # golden case: the class on a page of its own
    "mars_adamw": mars.MARS,
    "mars_adamw_gamma0": mars.MARS,
    "mars_m": mars_m.MARSM,
    "mars_m__ns_float32": mars_m.MARSM,
    "mars_m_gamma0": mars_m.MARSM,
    "moonlight_nesterov": muon.Muon,
    "moonlight_plain__ns_float32": muon.Muon,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_an_algorithm_follows_the_reference_and_the_class_of_the_package(name):
    case = next(c for c in MANIFEST["optimizers"] if c["id"] == name)
    h = case["hyperparameters"] | {"weight_decay": case["hyperparameters"].get("wd", 0.01)}
    settings = {key: h[key] for key in inspect.signature(PAGES[name]).parameters if key in h}
    names = [n for n in case.get("matrix_params", case["compare"]) if len(MANIFEST["shapes"][n]) == 2]
    own, ours = ({n: torch.nn.Parameter(torch.tensor(INPUTS[f"init/{n}"])) for n in MANIFEST["shapes"]} for _ in "12")
    check_against_reference(case, PAGES[name]([own[n] for n in names], **settings), own, names)
    precise = dict(case, newton_schulz=dict(dtype="float32")) if "newton_schulz" in case else case  # as on a page
    optimizer = build(precise, ours)
    for step in range(1, MANIFEST["steps"] + 1):
        give(ours, "grads", step)
        optimizer.step()
    for n in names:
        torch.testing.assert_close(own[n], ours[n], atol=2e-6, rtol=2e-5)


def test_the_pages_of_algorithms_are_short_and_need_torch_alone():
    for module in (mars, mars_m, muon):
        lines = Path(module.__file__).read_text().splitlines()
        assert len(lines) <= 60, module
        imports = [line for line in lines if line.startswith(("import", "from"))]
        assert imports == ["from collections.abc import Callable, Iterable", "import torch"], module


def test_the_page_of_mars_m_is_shown_whole_in_the_docs():
    assert Path(mars_m.__file__).read_text() in (Path(__file__).parent.parent / "docs/optimizers.md").read_text()


@pytest.mark.parametrize("every", MANIFEST["soap"]["precondition_frequency"])
def test_soap_follows_the_code_of_its_authors(every):
    """Fifty steps in float64: decay, bias correction, the first step, and the order of the bases at each refresh.

    Signs of eigenvectors must not matter, so they are changed. Where the first gradient leaves eigenvectors free, in
    the null space of the longer side, the authors' choice is used.
    """
    golden, flips = dict(np.load(GOLDEN / MANIFEST["soap"]["file"])), torch.Generator().manual_seed(every)
    s = dict(MANIFEST["soap"]["settings"], refresh_every=every, betas=tuple(MANIFEST["soap"]["settings"]["betas"]))
    params = {k[6:]: torch.nn.Parameter(torch.tensor(v)) for k, v in golden.items() if k.startswith("start/")}
    optimizer = SOAP(params.values(), largest_side=s.pop("max_precond_dim"), **s)
    for step in range(1, MANIFEST["soap"]["steps"] + 1):
        for name, p in params.items():
            p.grad = torch.tensor(golden[f"grads/{name}"][step - 1]).double()
        optimizer.step()
        if step == 1:
            for name, p in params.items():
                use_bases(optimizer.state[p], golden.get(f"basis/{name}"), flips)
        if step in MANIFEST["soap"]["snapshots"]:
            for name, p in params.items():
                expected = torch.tensor(golden[f"every{every}/step{step}/{name}"])
                torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11, msg=f"{name} at step {step}")


def use_bases(state, of_longer_side, flips):
    """Check that the first bases are eigenvectors in descending order, and change what is free in them."""
    for side in {"left", "right"} & state.keys():
        matrix, basis = state[side][0], state[f"{side}_basis"][0]
        rotated = basis.T @ matrix @ basis
        torch.testing.assert_close(rotated, rotated.diagonal().diag())
        assert (rotated.diagonal().diff() < 1e-12).all()
        if side == "right" and of_longer_side is not None:
            kept = np.linalg.matrix_rank(matrix.numpy())
            overlap = (basis.T @ torch.tensor(of_longer_side)).abs()
            torch.testing.assert_close(overlap[:kept, :kept], torch.eye(kept, dtype=torch.float64))
            basis.copy_(torch.tensor(of_longer_side))
        basis.mul_(torch.randint(2, (len(basis),), generator=flips) * 2 - 1)


def give(params, kind, step):
    for name, p in params.items():
        p.grad = torch.tensor(INPUTS[f"{kind}/{name}"][step - 1])


def training_config(case):
    """Settings of the trainer's own configs that reproduce a golden training case."""
    h = case["hyperparameters"]
    lr, decay = h["learning_rate"], h["weight_decay"]
    if case["optimizer"] == "adamw":
        return AdamWConfig(lr=lr, betas=tuple(h["betas"]), weight_decay=decay)
    if case["optimizer"] == "mars":
        approx = case["mode"] == "approx"
        return MARSConfig(lr=lr, weight_decay=decay, lr_1d=h["lr_1d"], weight_decay_1d=0.1, is_approx=approx)
    published = dict(lr=lr, adamw_lr=lr, weight_decay=decay, adamw_weight_decay=decay, adamw_eps_first=True)
    return (MARSMConfig if case["optimizer"] == "mars_m" else MuonConfig)(**published)


@pytest.mark.parametrize("case", MANIFEST["training"]["cases"], ids=lambda c: c["id"])
def test_training_follows_the_reference(case):
    t, data = MANIFEST["training"], dict(np.load(GOLDEN / MANIFEST["training"]["file"]))
    shape = {k: v for k, v in t["model"].items() if k != "source"}
    model = GPT(GPTConfig(**shape))
    model.load_state_dict({n: torch.tensor(data[f"param/{n}"]) for n, _ in model.named_parameters()})
    optimizer = build_optimizer(model, training_config(case))
    batches = torch.tensor(data["batches"]).long()
    s, peak, low = t["schedule"], case["hyperparameters"]["learning_rate"], case["hyperparameters"]["min_lr"]

    def gradient(i):
        loss = model(batches[i, :, :-1], batches[i, :, 1:])
        loss.backward()
        return loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), s["grad_clip"]).item()

    for i in range(s["steps"]):
        w, progress = s["warmup_iters"], (i - s["warmup_iters"]) / (s["lr_decay_iters"] - s["warmup_iters"])
        lr = peak * i / w if i < w else low + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - low)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if case["mode"] == "exact":
            gradient(i + 1)
            optimizer.update_previous_grad()
            optimizer.zero_grad()
        loss, norm = gradient(i)
        assert loss == pytest.approx(float(data[f"{case['id']}/losses"][i]), abs=case["tolerance"]["loss_abs"])
        assert norm == pytest.approx(float(data[f"{case['id']}/grad_norms"][i]), rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        if case["mode"] == "exact":
            optimizer.update_last_grad()
    last = model(batches[-1, :, :-1], batches[-1, :, 1:]).item()
    assert last == pytest.approx(float(data[f"{case['id']}/losses"][-1]), abs=case["tolerance"]["loss_abs"])


# ---- test vectors for others

VECTORS = json.loads((GOLDEN / "vectors.json").read_text())


def test_every_optimizer_has_a_test_vector_with_its_settings():
    assert VECTORS["optimizers"].keys() == OPTIMIZERS.keys()
    for name, vector in VECTORS["optimizers"].items():
        assert vector["settings"] == json.loads(json.dumps(asdict(OPTIMIZERS[name]))), name


@pytest.mark.parametrize("name", VECTORS["optimizers"])
def test_test_vectors_are_what_the_optimizers_compute(name):
    """`python -m optimizers.vectors` writes them. Newton-Schulz rounds to float32."""
    found = steps_of(OPTIMIZERS[name], VECTORS["start"], VECTORS["gradients"])
    for step, (one, other) in enumerate(zip(found, VECTORS["optimizers"][name]["weights"], strict=True), start=1):
        for tensor in VECTORS["roles"]:
            np.testing.assert_allclose(
                one[tensor], other[tensor], rtol=0, atol=1e-6, err_msg=f"{tensor} at step {step}"
            )


def test_the_command_writes_the_test_vectors(tmp_path):
    main([str(tmp_path / "vectors.json")])
    written = json.loads((tmp_path / "vectors.json").read_text())
    assert {key: written[key] for key in ("roles", "start", "gradients")} == {
        key: VECTORS[key] for key in ("roles", "start", "gradients")
    }
