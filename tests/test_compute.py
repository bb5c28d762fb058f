"""Settings of speed, memory and rounding: they change what they say and nothing else."""

import pytest
import torch
from conftest import CONFIG
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from config.load import ConfigError, load_config
from config.schema import free_keys
from model import GPT, GPTConfig
from runtime.compute import BACKENDS, ComputeConfig, attention_order, torch_settings

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=60, bias=True)


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (4, 16)."""
    both = torch.randint(60, (4, 17), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


def test_settings_are_reached_by_their_short_names_and_checked(tmp_path):
    keys = {f"compute.{name}" for name in ComputeConfig.__dataclass_fields__}
    assert keys <= free_keys()
    assert load_config(CONFIG, ["--attention=cudnn"]).compute.attention == "cudnn"
    with pytest.raises(ConfigError, match='compute.attention="fast": must be one of auto, cudnn, flash'):
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


def test_the_chosen_backend_comes_first_and_everything_is_put_back():
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with torch_settings(ComputeConfig(attention="cudnn")):
        assert _cur_sdpa_kernel_backends(with_priority=True) == [
            *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
        ]
        assert "cudnn,flash,efficient,math" in torch.compiler.config.cache_key_tag
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert "cudnn" not in torch.compiler.config.cache_key_tag
    assert attention_order(ComputeConfig(attention="efficient")) == ["efficient", "cudnn", "flash", "math"]
    assert attention_order(ComputeConfig(attention="math")) == ["math"]
