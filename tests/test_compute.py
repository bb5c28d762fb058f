"""Settings of speed, memory and rounding: their effects, and nothing else changes."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, ROOT, environment
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.parallel import DistributedDataParallel

import train_gpt
from config.load import ConfigError, describe_keys, load_config
from model import GPT, GPTConfig
from runtime.errors import UserError
from training.average import weights_in_model
from training.compute import (
    BACKENDS,
    ComputeConfig,
    apply_compute,
    attention_backends,
    bucket_size,
    cast_per_step,
    collector_paused,
    torch_settings,
)
from training.logger import read_metrics
from training.run_config import RunConfig, changeable_keys

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=60, bias=True)


def model_with(dropout: float = 0.0, bf16: bool = True, **settings) -> GPT:
    """A model in training mode with these settings, the same weights each time."""
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, dropout=dropout))
    apply_compute(model, ComputeConfig(**settings), bf16)
    return model


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (4, 16)."""
    both = torch.randint(60, (4, 17), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


def test_settings_have_short_names_and_are_checked():
    keys = {f"compute.{name}" for name in ComputeConfig.__dataclass_fields__}
    assert keys <= changeable_keys(RunConfig())
    described = describe_keys(load_config(CONFIG))
    assert all(re.search(rf"--{key}=\S+  \S", described) for key in keys)
    assert load_config(CONFIG, ["--attention=cudnn"]).compute.attention == "cudnn"
    with pytest.raises(ConfigError, match="compute.residual='half': must be one of float32, bfloat16"):
        load_config(CONFIG, ["--residual=half"])
    with pytest.raises(ConfigError, match="compute.attention='fast': must be one of auto, cudnn, flash"):
        load_config(CONFIG, ["--attention=fast"])


# ---- attention


def test_every_attention_backend_gives_the_same_loss_and_gradient():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    results = {}
    for name in ("auto", *BACKENDS):
        with torch_settings(ComputeConfig(attention=name)):
            loss = model(*tokens())
        results[name] = (loss, *torch.autograd.grad(loss, list(model.parameters())))
    for name, result in results.items():
        for ours, reference in zip(result, results["math"], strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4, msg=name)


def test_a_setting_enables_only_its_backends_and_the_previous_ones_are_restored():
    """torch moves cuDNN to the front on Hopper and Blackwell GPUs wherever it is enabled."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with torch_settings(ComputeConfig(attention="cudnn")):
        assert _cur_sdpa_kernel_backends(with_priority=True) == [
            *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
        ]
        assert "attention=CUDNN_ATTENTION,FLASH_ATTENTION" in torch.compiler.config.cache_key_tag
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert "CUDNN" not in torch.compiler.config.cache_key_tag
    for name in ("flash", "efficient", "math"):
        with torch_settings(ComputeConfig(attention=name)):
            enabled = _cur_sdpa_kernel_backends(with_priority=True)
        assert SDPBackend.CUDNN_ATTENTION not in enabled
        assert enabled == attention_backends(ComputeConfig(attention=name)) == BACKENDS[name]


# ---- residual stream and activation checkpointing


@pytest.mark.parametrize(
    "setting, dropout, backend", [("auto", 0.0, "flash"), ("auto", 0.1, "math"), ("math", 0.0, "math")]
)
def test_a_run_prints_the_attention_backend_that_torch_selects(arguments, capsys, setting, dropout, backend):
    """The backends of a CPU: flash without dropout, math with it, and what the setting allows."""
    train_gpt.main([*arguments, f"--attention={setting}", f"--dropout={dropout}"])
    assert f"\n  attention  {backend}\n" in capsys.readouterr().out


def test_a_bf16_residual_stream_is_bf16_between_all_blocks_and_close_to_float32():
    losses, gradients, seen = {}, {}, {}
    for residual in ("float32", "bfloat16"):
        model = model_with(residual=residual)
        for block in model.transformer.h:
            block.register_forward_hook(
                lambda module, args, out, key=residual: seen.setdefault(key, []).extend([args[0].dtype, out.dtype])
            )
        with torch.autocast("cpu", torch.bfloat16):
            losses[residual] = model(*tokens())
        losses[residual].backward()
        gradients[residual] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert seen == {"float32": 4 * [torch.float32], "bfloat16": 4 * [torch.bfloat16]}
    assert losses["bfloat16"].item() == pytest.approx(losses["float32"].item(), rel=2e-3)
    error = (gradients["bfloat16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 0 < error < 0.02


def test_settings_that_need_bf16_are_errors_in_a_float32_run(arguments, tmp_path):
    with pytest.raises(SystemExit, match="compute.residual=bfloat16: this run computes in float32; set --dtype"):
        train_gpt.main([*arguments, "--residual=bfloat16"])
    with pytest.raises(SystemExit, match="this run computes in float32"):
        train_gpt.main([*arguments, "--residual=bfloat16", "--preflight"])
    with pytest.raises(SystemExit, match="compute.cast_weights=step: this run computes in float32; set --dtype"):
        train_gpt.main([*arguments, "--cast_weights=step"])
    assert not list(tmp_path.glob("runs/run/*"))


def test_activation_checkpointing_gives_equal_gradients_with_dropout():
    results, runs = [], []
    for recompute in (False, True):
        model = model_with(dropout=0.3, activation_checkpointing=recompute)
        model.transformer.h[0].register_forward_pre_hook(lambda *_, key=recompute: runs.append(key))
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*tokens())
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert runs == [False, True, True]


# ---- weights cast once per step


def test_weights_cast_once_per_step_give_the_same_run_bit_for_bit(arguments, dataset, tmp_path):
    """With gradient accumulation, mars_m, evaluations, and a resume from a checkpoint."""
    once = [*arguments[:2], f"--log.folder={tmp_path / 'once'}", "--name=run", "--cast_weights=step"]
    for words in (arguments, once):
        train_gpt.main([*words, "--optimizer=mars_m", "--dtype=bfloat16"])
    folders = [tmp_path / "runs" / "run", tmp_path / "once" / "run"]
    weights = [load_file(f / "checkpoints/step_0000012/model.safetensors") for f in folders]
    assert weights[0].keys() == weights[1].keys() == dict(GPT(load_config(CONFIG).model).named_parameters()).keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [
        [(r["step"], r.get("loss"), r.get("val_loss")) for r in read_metrics(f / "metrics.jsonl")] for f in folders
    ]
    assert losses[0] == losses[1]
    shutil.rmtree(folders[1] / "checkpoints/step_0000012")
    train_gpt.main([*once, "--optimizer=mars_m", "--dtype=bfloat16"])  # from step 8
    again = load_file(folders[1] / "checkpoints/step_0000012/model.safetensors")
    assert all(torch.equal(weights[0][name], again[name]) for name in again)


def test_weights_cast_once_per_step_need_one_graph_and_are_not_in_the_state():
    torch._dynamo.utils.counters.clear()
    results = []
    for when in ("micro_batch", "step"):
        model = model_with(cast_weights=when)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if when == "step":
            cast_per_step(model, optimizer)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        losses = []
        for step in range(3):
            for part in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = compiled(*tokens(2 * step + part))
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        results.append((losses, model.state_dict()))
    (one, weights), (two, others) = results
    assert one == two
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    )  # one for each model: updates need no recompilation


@torch.no_grad()
def loss_of(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*tokens())


def test_other_weights_reach_the_copies_that_are_cast_once_per_step():
    losses = []
    for when in ("micro_batch", "step"):
        model = model_with(cast_weights=when)
        if when == "step":
            cast_per_step(model, torch.optim.SGD(model.parameters()))
        others = {name: 1.5 * p.detach() for name, p in model.named_parameters()}
        before = loss_of(model)
        with weights_in_model(model, others):
            losses.append(loss_of(model))
        assert torch.equal(loss_of(model), before)
        assert not torch.equal(losses[-1], before)
    assert torch.equal(*losses)


# ---- DDP


def test_buckets_are_a_tenth_of_the_gradients_and_at_least_25_mb():
    with torch.device("meta"):
        large = GPT(GPTConfig(n_layer=36, n_head=20, n_embd=1280))
    assert bucket_size(large, ComputeConfig()) == large.num_params() * 4 // 2**20 // 10 == 295
    assert bucket_size(GPT(SHAPE), ComputeConfig()) == 25
    assert bucket_size(large, ComputeConfig(bucket_mb=64)) == 64
    with pytest.raises(ConfigError, match="compute.bucket_mb=-1: must be a whole number of at least 0"):
        load_config(CONFIG, ["--bucket_mb=-1"])


@contextmanager
def process_group_of_one(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("settings", [{}, {"cast_weights": "step", "activation_checkpointing": True}])
def test_a_compiled_model_in_ddp_is_split_at_the_buckets_with_all_settings(tmp_path, settings):
    """So gradients are sent during backward. A model in one graph would send them all at its end."""
    graphs, results = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    idx, targets = (t.repeat(1, 4) for t in tokens())
    with process_group_of_one(tmp_path):
        for compiled in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=128, block_size=64, vocab_size=60))
            apply_compute(model, ComputeConfig(**settings), bf16=True)
            if "cast_weights" in settings:
                cast_per_step(model, torch.optim.SGD(model.parameters()))
            forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if compiled else model
            forward = DistributedDataParallel(forward, bucket_cap_mb=1, gradient_as_bucket_view=True)
            for part in (forward.no_sync(), nullcontext()):
                with part:
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = forward(idx, targets)
                    loss.backward()
            results.append([loss, *(p.grad for p in model.parameters())])
    assert len(graphs) >= 3
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-3, rtol=2e-2)


# ---- deterministic replay and the garbage collector


def process_settings() -> dict:
    """The present settings of torch, cuBLAS and Python."""
    return dict(
        deterministic=torch.are_deterministic_algorithms_enabled(),
        inductor=torch._inductor.config.deterministic,
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        benchmark=torch.backends.cudnn.benchmark,
        workspace=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        attention=_cur_sdpa_kernel_backends(with_priority=True),
        collector=gc.isenabled(),
        frozen=gc.get_freeze_count() > 0,
    )


@pytest.fixture
def nothing_is_frozen():
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_deterministic_run_changes_the_settings_and_restores_them(
    arguments, monkeypatch, tmp_path, nothing_is_frozen
):
    """The garbage collector is off during the steps of every run."""
    during, accumulate = [], train_gpt.Trainer.accumulate
    monkeypatch.setattr(
        train_gpt.Trainer, "accumulate", lambda self, *a: (during.append(process_settings()), accumulate(self, *a))[1]
    )
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = process_settings()
    train_gpt.main([*arguments, "--deterministic=true"])
    assert process_settings() == before
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    expected = dict(deterministic=True, inductor=True, warn_only=False, benchmark=False, workspace=":4096:8")
    assert during == 12 * [expected | dict(attention=backends, collector=False, frozen=True)]

    during.clear()
    shutil.rmtree(tmp_path / "runs/run/checkpoints/step_0000012")
    train_gpt.main(arguments)  # continued without it
    assert during == 4 * [before | dict(attention=backends, collector=False, frozen=True)]
    assert process_settings() == before


def test_settings_are_restored_after_an_error_and_a_given_workspace_is_kept(monkeypatch, nothing_is_frozen):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = process_settings()
    with pytest.raises(KeyError), torch_settings(ComputeConfig(deterministic=True)), collector_paused():
        assert process_settings()["workspace"] == ":16:8"
        assert process_settings()["deterministic"]
        raise KeyError
    assert process_settings() == before


def test_attention_is_not_cudnns_unless_somebody_asks_for_it():
    assert all(b.name != "CUDNN_ATTENTION" for b in attention_backends(ComputeConfig()))
    assert attention_backends(ComputeConfig(attention="cudnn"))[0].name == "CUDNN_ATTENTION"


def test_cudnn_attention_is_an_error_in_a_deterministic_run():
    with pytest.raises(
        ConfigError, match='compute.attention="cudnn": its gradients are not deterministic; use "flash"'
    ):
        load_config(CONFIG, ["--attention=cudnn", "--deterministic=true"])
    backends = attention_backends(ComputeConfig(attention="efficient", deterministic=True))
    assert SDPBackend.CUDNN_ATTENTION not in backends


# ---- the loss by a Triton kernel

IN_THE_INTERPRETER = """
import json, sys, torch
import torch.nn.functional as F
from training import fused_loss

fused_loss.wrap_triton = lambda kernel: kernel  # torch wraps only what is compiled
torch.manual_seed(0)
rows, width, vocab = map(int, sys.argv[1:])
padded = -(-vocab // 64) * 64
hidden = torch.randn(rows, width).bfloat16().requires_grad_()
table = (torch.randn(padded, width) / 2).bfloat16().requires_grad_()
targets = torch.randint(vocab, (rows,))
targets[2] = -1
loss = fused_loss.fused_loss(hidden, table, targets, vocab)
(loss / 12).backward()

logits = (hidden @ table.T).detach()  # the same rounding
exact = logits.double().requires_grad_()
expected = F.cross_entropy(exact[:, :vocab], targets, ignore_index=-1)
expected.backward()
losses = fused_loss.cross_entropy_(logits, targets, vocab)
rounded = logits.double() / (rows - 1) / 12
of_tables = [(rounded @ table.double(), hidden.grad), (rounded.T @ hidden.double(), table.grad)]
print(json.dumps({
    "loss": abs(loss.item() - expected.item()),
    "gradient": ((logits.double() / (rows - 1) - exact.grad).norm() / exact.grad.norm()).item(),
    "of products": max(((b.double() - a).norm() / a.norm()).item() for a, b in of_tables),
    "size": max(abs((a * b).sum() / (a * a).sum() - 1).item() for a, b in of_tables),
    "padding": logits[:, vocab:].abs().sum().item(),
    "ignored": logits[2].abs().sum().item() + losses[2].item(),
}))
"""


@pytest.mark.parametrize("rows, width, vocab", [(128, 64, 1000), (96, 128, 257), (32, 64, 50257), (128, 64, 64)])
def test_the_fused_loss_is_the_cross_entropy_of_its_bf16_logits(rows, width, vocab):
    """In Triton's interpreter, against float64: odd vocabularies, padded columns, an ignored target."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", IN_THE_INTERPRETER, str(rows), str(width), str(vocab)]
    environ = environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout)
    assert error["loss"] < 1e-5
    assert error["gradient"] < 2**-8  # is rounded to bf16 once
    assert error["of products"] < 2**-8
    assert error["size"] < 1e-3  # 1/12 in bf16 is wrong by 2e-3
    assert error["padding"] == error["ignored"] == 0


def test_the_fused_loss_is_refused_where_it_cannot_run(monkeypatch):
    config, on_meta = ComputeConfig(fused_loss=True), torch.device("meta")
    with on_meta:
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=10))
    with pytest.raises(UserError, match="compute.fused_loss=True: this run computes in float32"):
        apply_compute(model, config, bf16=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "training.fused_loss", raising=False)
    with pytest.raises(UserError, match="Triton is not installed"):
        apply_compute(model, config, bf16=True)
    with pytest.raises(UserError, match="needs a GPU"):
        apply_compute(model.to_empty(device="cpu"), config, bf16=True)
