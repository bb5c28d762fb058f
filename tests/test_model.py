"""The model against the golden data, Hugging Face's GPT-2 and published tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, KVCache
from weights import open_trained

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["models"]


def golden_model(case: dict, data: dict) -> GPT:
    gelu = "exact" if "exact" in case["gelu"] else "tanh"
    model = GPT(GPTConfig(**case["config"], gelu=gelu))
    model.load_state_dict(
        {k.removeprefix("param/"): torch.tensor(v) for k, v in data.items() if k.startswith("param/")}
    )
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_logits_loss_and_gradients_equal_the_golden_data(case):
    data = dict(np.load(GOLDEN / case["file"]))
    model, tolerance = golden_model(case, data), case["tolerance"]
    x, y = torch.tensor(data["x"]).long(), torch.tensor(data["y"]).long()
    logits = model(x)
    np.testing.assert_allclose(logits.detach().numpy(), data["logits"], atol=tolerance["logits_abs"], rtol=0)
    np.testing.assert_allclose(
        logits[:, -1:].detach().numpy(), data["logits_last"], atol=tolerance["logits_abs"], rtol=0
    )
    loss = model(x, y)
    assert abs(loss.item() - data["loss"]) <= tolerance["loss_abs"]
    loss.backward()
    gradients = {k.removeprefix("grad/"): v for k, v in data.items() if k.startswith("grad/")}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        error = np.linalg.norm(p.grad.numpy() - gradients[name])
        assert error <= tolerance["grad_relative"] * np.linalg.norm(gradients[name]) + tolerance["grad_abs"], name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_a_hugging_face_folder_computes_what_hugging_face_computes(tmp_path, scaled, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257,
        n_positions=32,
        n_embd=48,
        n_layer=3,
        n_head=4,
        activation_function=activation,
        scale_attn_by_inverse_layer_idx=scaled,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():  # biases and gains away from 0 and 1
        p.data += 0.02 * torch.randn_like(p)
    reference.save_pretrained(tmp_path)
    ours = open_trained(tmp_path, torch.device("cpu")).model
    assert ours.config.vocab_size == 257
    assert ours.config.padded_vocab_size == 320
    x = torch.randint(257, (3, 33))
    loss = ours(x[:, :-1], x[:, 1:])
    theirs = reference(x[:, :-1])
    torch.testing.assert_close(ours(x[:, :-1]), theirs.logits, atol=2e-5, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(theirs.logits.flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_a_hugging_face_folder_of_another_architecture(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, activation_function="relu")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu is not a GPT-2"):
        open_trained(tmp_path, torch.device("cpu"))


# n_layer, n_head, n_embd, parameters with biases and without, GFLOPs per token
SIZES = {
    "124M": (12, 12, 768, 124.48e6, 124.37e6, 0.8554),
    "355M": (24, 16, 1024, 354.87e6, 354.60e6, 2.4249),
    "774M": (36, 20, 1280, 774.09e6, 773.58e6, 5.2029),
    "1558M": (48, 25, 1600, 1557.69e6, 1556.84e6, 10.2800),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_flops_of_the_four_sizes(size):
    n_layer, n_head, n_embd, with_bias, without, gflops = SIZES[size]
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, bias=True))
        assert GPT(GPTConfig(**shape)).num_params() == pytest.approx(without, abs=5e3)
    assert model.num_params() == pytest.approx(with_bias, abs=5e3)
    assert model.flops_per_token() / 1e9 == pytest.approx(gflops, abs=5e-5)


def test_padded_rows_have_no_part_in_loss_or_gradient():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=70))
    x = torch.randint(70, (2, 9))
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    assert model(x[:, :-1]).shape == (2, 8, 70)
    assert model.transformer.wte.weight.grad[70:].abs().max() == 0
    model.transformer.wte.weight.data[70:] = 1e4
    assert model(x[:, :-1], x[:, 1:]) == loss


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunked loss")
def test_a_loss_in_chunks_equals_the_loss_of_whole_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=300))
    assert model.config.padded_vocab_size > 300
    x, y = torch.randint(300, (10, 64)), torch.randint(300, (10, 64))
    y[8:] = -1
    assert model._loss_in_chunks(model.hidden(x))
    gradients = []
    for loss in (
        model(x, y),
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1),
    ):
        (loss * 0.25).backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_initial_weights_have_gpt2s_scales():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=512, bias=True))
    for name, p in model.named_parameters():
        expected = 0.02 / 16**0.5 if name.endswith("c_proj.weight") else 0.02
        if p.dim() >= 2:
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name


def test_every_parameter_has_a_role():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, bias=True))
    roles = model.parameter_roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert {n for n, r in roles.items() if r == "embedding"} == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {r for n, r in roles.items() if ".c_" in n and n.endswith("weight")} == {"matrix"}
    assert {r for n, r in roles.items() if "ln_" in n or n.endswith("bias")} == {"vector"}


def test_cached_logits_equal_whole_context_logits():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=64, bias=True)
    model = GPT(config).eval()
    x, cache = torch.randint(64, (2, 12)), KVCache()
    whole = model(x)
    pieces = [model.logits(model.hidden(x[:, a:b], cache)) for a, b in ((0, 5), *((i, i + 1) for i in range(5, 12)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="13 tokens do not fit in the context of 12"):
        model.hidden(x[:, :1], cache)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64, dropout=0.5))
    x = torch.randint(64, (2, 8))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_impossible_shapes_are_refused_together():
    with pytest.raises(ValueError, match=r"n_layer=0.*dropout=1.5.*gelu='relu'"):
        GPT(GPTConfig(n_layer=0, dropout=1.5, gelu="relu"))
    with pytest.raises(ValueError, match="n_embd=10: must be a multiple of n_head=4"):
        GPT(GPTConfig(n_embd=10, n_head=4))


def test_the_loss_of_bfloat16_logits_is_that_of_the_same_logits_in_float32():
    """torch rounds the log-softmax of bf16 logits to bf16, so probabilities would not sum to 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=16, vocab_size=5000)).bfloat16()
    idx = torch.randint(5000, (4, 16))
    with torch.no_grad():
        logits = model(idx)
        assert logits.dtype == torch.bfloat16
        exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), idx.flatten())
        assert abs(model(idx, idx).double() - exact) < 1e-5
