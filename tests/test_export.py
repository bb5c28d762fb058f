"""Exports to Hugging Face folders, and models from the checkpoints of other programs."""

import json
import os
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, change_state
from safetensors.torch import load_file, save_file
from small_runs import SHAPE, byte_dataset, byte_run, small_model
from test_model import CASES, GOLDEN, golden_model

import train_gpt
from data.tokenizer import GPT2_PATTERN, ByteTokenizer, GPT2Tokenizer
from eval import card, export
from model import GPT, GPTConfig
from runtime.files import locked, sha256_of
from training.checkpoint import open_checkpoint
from weights import load_weights, open_trained

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return byte_dataset(tmp_path_factory.mktemp("data") / "licence")


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    return byte_run(tmp_path_factory.mktemp("runs"), dataset)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    out = tmp_path_factory.mktemp("out") / "hf"
    export.main([str(run), str(out)])
    return out


def test_an_export_loads_by_the_auto_classes_and_computes_the_same(run, exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert model.config.vocab_size == 257 == len(tokenizer)
    assert model.config.scale_attn_by_inverse_layer_idx
    text = "Licensed under: \u00e9\u4e2d\n\n\t the  'License'"
    ids = tokenizer(text)["input_ids"]
    assert ids == ByteTokenizer().encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 256
    ours = open_trained(run, CPU)
    with torch.no_grad():
        difference = (model(torch.tensor([ids])).logits - ours.model(torch.tensor([ids]))).abs().max()
    assert difference < 1e-4
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("attn.bias"))
    page = (exported / "README.md").read_text()
    assert "| val_loss | 5.5 |" in page
    assert '"optimizer": "adamw"' in page


@pytest.mark.parametrize("what", ["scale", "gelu", "bias"])
def test_an_export_with_other_logits_is_deleted(run, tmp_path, monkeypatch, what):
    right = export.to_hugging_face

    def wrong(*arguments):
        out = right(*arguments)
        if what == "scale":
            out.config.scale_attn_by_inverse_layer_idx = False
        elif what == "gelu":
            out.config.activation_function = "gelu"
        else:
            out.transformer.h[1].mlp.c_fc.bias.data[0] = 1e-2
        return out

    monkeypatch.setattr(export, "to_hugging_face", wrong)
    with pytest.raises(SystemExit, match="more than rounding"):
        export.main([str(run), str(tmp_path / "hf")])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_an_export_of_an_export_are_errors(run, exported, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for out in (exported, ".", tmp_path / "link"):
        with pytest.raises(SystemExit, match="exists; give a folder that does not exist yet"):
            export.main([str(run), str(out)])
    with pytest.raises(SystemExit, match="is a Hugging Face folder already"):
        export.main([str(exported), str(tmp_path / "again")])


def test_a_tokenizer_of_another_vocabulary_is_an_error(dataset, tmp_path):
    wide = byte_run(tmp_path, dataset, vocab_size=2000)
    with pytest.raises(ValueError, match="tokenizer byte, 257 ids, does not fit vocab_size=2000"):
        open_trained(wide, CPU)


def test_a_padded_vocabulary_is_cut_to_the_tokenizer(dataset, tmp_path):
    run = byte_run(tmp_path, dataset, vocab_size=320)
    export.main([str(run), str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 257


@pytest.mark.parametrize("bias", [False, True])
def test_biases_and_the_exact_gelu_are_exported(dataset, tmp_path, bias):
    run = byte_run(tmp_path, dataset, bias=bias, gelu="exact", scale_attn_by_inverse_layer_idx=False)
    export.main([str(run), str(tmp_path / "hf")])
    back, ours = open_trained(tmp_path / "hf", CPU), open_trained(run, CPU)
    assert back.model.config == replace(ours.model.config, bias=True)
    idx = torch.arange(40)[None]
    torch.testing.assert_close(back.model(idx), ours.model(idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_checkpoints_of_nanogpt_and_mars_give_the_reference_logits(case, tmp_path):
    data = dict(np.load(GOLDEN / case["file"]))
    args = dict(case["config"]) | {"dropout": 0.0, "bias": case["config"]["bias"]}
    if "exact" in case["gelu"]:
        args.pop("scale_attn_by_inverse_layer_idx", None)  # nanoGPT has no such key
    weights = {f"_orig_mod.{k[6:]}": torch.tensor(v) for k, v in data.items() if k.startswith("param/")}
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    for layer in range(args["n_layer"]):  # causal masks that the reference keeps as buffers
        weights[f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
    content = dict(model=weights, model_args=args, iter_num=7, best_val_loss=torch.tensor(3.25), config={"seed": 5000})
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "ckpt.pt")
    found = open_trained_with_any_tokenizer(tmp_path / "ckpt.pt", args["vocab_size"])
    assert (found.state["step"], found.state["best_val_loss"]) == (7, 3.25)
    with torch.no_grad():
        logits = found.model(torch.tensor(data["x"]).long())
    np.testing.assert_allclose(logits.numpy(), data["logits"], atol=case["tolerance"]["logits_abs"], rtol=0)
    assert torch.equal(logits, golden_model(case, data)(torch.tensor(data["x"]).long()))


def open_trained_with_any_tokenizer(path, vocab_size):
    """The golden models have 128 or 256 ids, which no tokenizer has."""

    class Exact(ByteTokenizer):
        pass

    Exact.vocab_size = vocab_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weights.get_tokenizer", lambda *named: Exact())
        return open_trained(path, CPU, "byte")


SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=320, bias=False, dropout=0.0)


def pt_file(path: Path, **changes) -> Path:
    model = small_model(config=replace(SHAPE, scale_attn_by_inverse_layer_idx=False))
    content = dict(model=dict(model.state_dict()), model_args=SIZES, iter_num=1)
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)
    return path


def changed_weights(change) -> dict:
    """The weights of a small model, of which one is changed."""
    weights = dict(small_model(config=replace(SHAPE, scale_attn_by_inverse_layer_idx=False)).state_dict())
    return weights | {"transformer.wte.weight": change(weights["transformer.wte.weight"])}


def test_a_pt_file_can_be_exported(tmp_path):
    export.main([str(pt_file(tmp_path / "ckpt.pt")), str(tmp_path / "hf")])
    assert "| code | nanoGPT |" in (tmp_path / "hf" / "README.md").read_text()


def test_a_released_model_is_read_from_the_hubs_cache(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    shutil.copytree(exported, snapshot)
    for name in ("gpt2", "openai-community/gpt2"):
        found = open_trained(name, CPU)
        assert (found.name, found.kind, found.tokenizer.name) == ("gpt2", "huggingface", "byte")
    with pytest.raises(
        ValueError, match="gpt2-xl: neither in the hub's cache nor reachable .* tokenizer.json of"
    ) as error:
        open_trained("gpt2-xl", CPU)
    assert "\n" not in str(error.value)


class NotATensor:
    pass


def break_hugging_face(folder: Path, exported: Path, how: str) -> Path:
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "llama":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    elif how == "deeper":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": 3}))
    elif how == "wider":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_embd": 64}))
    elif how == "untied":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
        save_file(load_file(weights) | {"lm_head.weight": torch.ones(257, 32)}, weights, {"format": "pt"})
    elif how == "epsilon":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_norm_epsilon": 1e-3}))
    elif how == "config":
        config.write_text("{")
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif how == "gone":
        weights.unlink()
    elif how == "list":
        weights.unlink()
        torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    elif how == "number":
        weights.unlink()
        torch.save({"transformer.h.0.attn.c_attn.weight": 3}, folder / "pytorch_model.bin")
    elif how == "types":
        odd = {"n_embd": "wide", "activation_function": ["gelu"]}
        config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    elif how == "text":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_layer": "two"}))
    elif how == "nested":
        config.write_text("[" * 100_000)
    return folder


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut", "model.safetensors: damaged"),
        ("llama", "llama with \\S+ is not a GPT-2"),
        ("deeper", "not the GPT-2 its settings describe"),
        ("wider", "has shape .*, its settings say"),
        ("untied", "its output layer is not the token embedding"),
        ("epsilon", "another layer norm or attention scale"),
        ("config", "config.json: not readable as JSON"),
        ("tokenizer", "its tokenizer files cannot be read"),
        ("gone", "no model.safetensors or pytorch_model.bin in it"),
        ("list", "pytorch_model.bin: not a file of weights"),
        ("number", "transformer.h.0.attn.c_attn.weight is not a tensor of weights"),
        ("types", "gpt2 with .'gelu'. is not a GPT-2"),
        ("text", "its settings are not those of a GPT-2 .n_layer='two'"),
        ("nested", "config.json: not readable as JSON"),
    ],
)
def test_a_broken_hugging_face_folder_is_one_clear_line(exported, tmp_path, how, message):
    with pytest.raises(ValueError, match=message) as error:
        open_trained(break_hugging_face(tmp_path / "hf", exported, how), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_args=None), "not a checkpoint of nanoGPT or MARS"),
        (dict(model_args={"dim": 512}), "another architecture than GPT-2"),
        (
            dict(model_args=SIZES | dict(n_head=5)),
            "ckpt.pt: its settings are not those of a GPT-2 .*multiple of n_head=5",
        ),
        (dict(model_args=SIZES | dict(n_layer="two")), "ckpt.pt: its settings are not those of a GPT-2"),
        (dict(model={"tok_embeddings.weight": torch.ones(2, 2)}), "not the GPT-2 its settings describe"),
        (
            dict(model=dict(small_model().state_dict()) | {"lm_head.weight": torch.ones(320, 32)}),
            "not the token embedding",
        ),
        (dict(config=NotATensor()), "holds more than tensors and numbers"),
        (
            dict(model_args=SIZES | dict(vocab_size="many")),
            "its settings are not those of a GPT-2 .vocab_size",
        ),
        (dict(model_args=SIZES | dict(bias=[[1]])), "ckpt.pt: its settings are not those of a GPT-2 .bias"),
        (dict(model_args=[1]), "not a checkpoint of nanoGPT or MARS"),
        (dict(model={}), "not the GPT-2 its settings describe"),
        (dict(model={"a": {"b": [{}]}}), "a is not a tensor of weights"),
        (dict(model={7: torch.ones(2)}), "not the GPT-2 its settings describe"),
        (dict(model=changed_weights(lambda t: t.to(torch.int8))), "is not a tensor of weights"),
        (dict(model=changed_weights(lambda t: t.sum())), "has shape \\(\\), its settings say"),
        (dict(iter_num="seven"), "its iter_num is not a number"),
        (dict(best_val_loss=torch.ones(3)), "its best_val_loss is not a number"),
    ],
)
def test_a_pt_file_of_another_program_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        open_trained(pt_file(tmp_path / "ckpt.pt", **changes), CPU)
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_clear_line(dataset, tmp_path):
    path = pt_file(tmp_path / "ckpt.pt")
    for content in (path.read_bytes()[:3000], b"", b"\xa5no pickle", b"PK" + bytes(99), b"\x80\x02]q\x00K\x01a."):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="damaged or of another format|not a checkpoint of nanoGPT") as error:
            export.main([str(path), str(tmp_path / "hf")])
        assert "\n" not in str(error.value)
    weights = byte_run(tmp_path, dataset) / "checkpoints" / "step_0000030" / "model.safetensors"
    os.truncate(weights, 3000)
    with pytest.raises(SystemExit, match="does not match its sha256"):
        export.main([str(weights.parent), str(tmp_path / "hf")])


def test_without_dataset_and_tokenizer_files_the_vocabulary_size_tells_the_tokenizer(exported, tmp_path):
    run = byte_run(tmp_path, tmp_path / "no dataset")
    assert open_trained(run, CPU).tokenizer.name == "byte"
    for file in exported.glob("tokenizer*"):
        os.rename(file, tmp_path / file.name)
    try:
        assert open_trained(exported, CPU).tokenizer.name == "byte"
    finally:
        for file in tmp_path.glob("tokenizer*"):
            os.rename(file, exported / file.name)


def test_merges_follow_from_ranks():
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"he": 257, b"the": 258, b" the": 259}
    assert export.merge_of(b"the", 258, ranks) == (b"th", b"e")
    assert export.merge_of(b" the", 259, ranks) == (b" ", b"the")


def test_a_byte_pair_tokenizer_is_exported(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    pairs = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"in", b" a", b"\n\n", "\u00e9".encode()]
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)
    ranks = {p: i for i, p in enumerate(pairs)}
    tokenizer.eot = len(ranks)
    tokenizer.encoding = tiktoken.Encoding(
        "small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    export.hugging_face_tokenizer(tokenizer, 64).save_pretrained(tmp_path)
    assert export.tokenizers_agree(tokenizer, tmp_path)
    tokenizer.encode = lambda text: [0]
    assert not export.tokenizers_agree(tokenizer, tmp_path)


def test_an_export_in_bfloat16_holds_the_rounded_weights(run, tmp_path):
    export.main([str(run), str(tmp_path / "hf"), "--dtype", "bfloat16"])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    embedding = open_trained(run, CPU).model.transformer.wte.weight.detach()[:257]
    assert torch.equal(tensors["transformer.wte.weight"], embedding.bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    back = open_trained(tmp_path / "hf", CPU).model.transformer.wte.weight.detach()[:257]
    assert torch.equal(back, embedding.bfloat16().float())


def test_programs_that_read_vocab_json_and_merges_txt_get_the_same_ids(exported, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(exported / name, tmp_path)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.encode(export.HARD_TEXT) == ByteTokenizer().encode(export.HARD_TEXT)
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 256


@pytest.mark.parametrize("kind", ["bin", "bin in parts", "safetensors in parts"])
def test_every_form_of_a_hugging_face_folder_is_read(exported, tmp_path, kind):
    weights = load_file(exported / "model.safetensors")
    names, parts = sorted(weights), 2 if "parts" in kind else 1
    for file in exported.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for i in range(parts):
        part = {name: weights[name] for name in names[i::parts]}
        number = f"-{i + 1:05d}-of-{parts:05d}" if parts > 1 else ""
        if "bin" in kind:
            torch.save(part, tmp_path / f"pytorch_model{number}.bin")
        else:
            save_file(part, tmp_path / f"model{number}.safetensors", metadata={"format": "pt"})
    save_file({"other": torch.ones(2)}, tmp_path / "adapter.safetensors")  # not a part of the model
    found, expected = open_trained(tmp_path, CPU), open_trained(exported, CPU)
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_pytorch_model_bin_that_holds_code_is_not_loaded(exported, tmp_path):
    for file in exported.glob("*.json"):
        shutil.copy(file, tmp_path)
    torch.save({"weights": NotATensor()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: holds more than tensors and numbers"):
        open_trained(tmp_path, CPU)


def test_another_width_of_the_mlp_is_named(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "hf")
    config = json.loads((exported / "config.json").read_text())
    for n_inner, accepted in ((None, True), (128, True), (96, False)):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"n_inner": n_inner}))
        if accepted:
            open_trained(tmp_path / "hf", CPU)
        else:
            with pytest.raises(ValueError, match="n_inner=96 is not 4 n_embd, as in GPT-2"):
                open_trained(tmp_path / "hf", CPU)


def test_a_run_starts_with_the_weights_of_an_export(run, exported, dataset, tmp_path):
    words = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=257", "--bias", "--dropout=0"]
    words += [
        "--scale_attn_by_inverse_layer_idx",
        "--lr=0",
        "--schedule.min_lr=0",
        "--steps=1",
        "--warmup=0",
        "--name=run",
    ]
    words += [f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", f"--init_from={exported}"]
    train_gpt.main([str(CONFIG), *words])
    ours = load_file(tmp_path / "run/checkpoints/step_0000001/model.safetensors")
    theirs = open_checkpoint(run).model()
    for name, tensor in theirs.items():
        rows = 32 if name.endswith("wpe.weight") else 257  # a shorter context, and a table without its padding
        assert torch.equal(ours[name][:rows], tensor[:rows]), name
    assert all((ours[name] == 0).all() for name in ours.keys() - theirs.keys())  # the biases, which the export adds


def test_weights_of_another_model_name_the_settings_to_give(exported, dataset, tmp_path):
    words = [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path}", "--name=run", f"--init_from={exported}"]
    with pytest.raises(SystemExit) as error:
        train_gpt.main([*words, "--vocab_size=320"])
    settings = "--n_embd=32 --bias=true --scale_attn_by_inverse_layer_idx=true --vocab_size=257"
    assert f"init_from={exported}: another model; give {settings} (" in str(error.value)
    assert "vocab_size: the checkpoint has 257, the run 320" in str(error.value)
    train_gpt.main([*words, *settings.split(), "--dropout=0", "--steps=1", "--warmup=0", "--min_lr=0"])


def test_a_run_whose_name_ends_like_the_averaged_weights_is_reached(dataset, tmp_path):
    run = byte_run(tmp_path, dataset, name="x:average")
    assert open_trained(run, CPU).name == "x:average"
    with pytest.raises(ValueError, match="x:average:average: this run keeps no averaged weights"):
        open_trained(f"{run}:average", CPU)


def test_a_dataset_as_a_run_and_a_shard_as_a_dataset_are_one_clear_line(dataset, tmp_path):
    with pytest.raises(SystemExit, match=f"{dataset}: is a dataset; give a run or a checkpoint"):
        export.main([str(dataset), str(tmp_path / "hf")])
    shard = next(dataset.glob("train*.bin"))
    with pytest.raises(SystemExit, match=f"data.path {shard}: is a file; give the folder of the shards, {dataset}"):
        train_gpt.main([str(CONFIG), f"--data.path={shard}", f"--log.folder={tmp_path}"])


def anonymous_memory():
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("kind", ["pt", "hugging_face"])
def test_reading_other_weights_holds_one_extra_copy_at_most(tmp_path, kind):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=512, block_size=64, vocab_size=40_000, bias=True, gelu="tanh")
    model, path = GPT(config), tmp_path / "ckpt.pt"
    if kind == "pt":
        args = dict(n_layer=2, n_head=2, n_embd=512, block_size=64, vocab_size=40_000, bias=True)
        args["scale_attn_by_inverse_layer_idx"] = False  # of the MARS code, with its form of the GELU
        torch.save(dict(model=dict(model.state_dict()), model_args=args, iter_num=1), path)
    else:
        path = tmp_path
        export.to_hugging_face(model, 0, None).save_pretrained(path)
    size, before, most, done = 4 * model.num_params(), anonymous_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    load_weights(model, str(path))
    done.set()
    thread.join()
    assert size > 100e6
    assert most[0] - before < 1.4 * size


OPENAI_KEYS = """activation_function architectures attn_pdrop bos_token_id embd_pdrop eos_token_id initializer_range
layer_norm_epsilon model_type n_ctx n_embd n_head n_layer n_positions resid_pdrop summary_activation
summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params vocab_size"""


def test_the_config_has_every_key_of_that_of_openai(exported):
    """Programs such as the converter of llama.cpp ask for these keys."""
    config = json.loads((exported / "config.json").read_text())
    assert set(OPENAI_KEYS.split()) <= config.keys()
    assert (config["n_ctx"], config["n_positions"]) == (64, 64)
    assert config["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_of_an_export_follows_the_umask(run, tmp_path, mask):
    before = os.umask(mask)
    try:
        export.main([str(run), "--out", str(tmp_path / "hf")])
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "hf").iterdir()} == {0o666 & ~mask}
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o777 & ~mask
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_two_exports_of_one_folder_at_once_are_one_clear_line(run, tmp_path):
    with locked(tmp_path / ".hf.lock"), pytest.raises(SystemExit, match="hf: another export writes it at the moment"):
        export.main([str(run), str(tmp_path / "hf")])


def test_the_folder_is_named_once(run, tmp_path):
    for words in ([], [str(tmp_path / "a"), "--out", str(tmp_path / "b")]):
        with pytest.raises(SystemExit, match="give one folder to write: CHECKPOINT OUT, or CHECKPOINT --out OUT"):
            export.main([str(run), *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 3000, 60_000])
def test_an_export_on_a_full_disk_is_one_clear_line(run, tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # a write beyond fails, as on a full disk
        try:
            export.main([str(run), str(tmp_path / "hf")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).startswith(f"eval.export: {tmp_path / 'hf'} was not written: ")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_only_the_weights_are_hashed_and_only_once(dataset, tmp_path, monkeypatch):
    """The optimizer state is twice as large; nothing that evaluates reads it."""
    run, hashed = byte_run(tmp_path, dataset), []
    (folder,) = (run / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text())
    change_state(folder, sha256=state["sha256"] | {"optimizer-0.safetensors": "a" * 64})
    (folder / "optimizer-0.safetensors").write_bytes(b"not the optimizer state")
    for module in ("training.checkpoint", "weights"):
        monkeypatch.setattr(f"{module}.sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    assert open_trained(run, CPU).sha256 == state["sha256"]["model.safetensors"]
    assert hashed == ["model.safetensors"]
    hashed.clear()
    load_weights(small_model(), str(run))
    assert hashed == ["model.safetensors"]
    with pytest.raises(ValueError, match="optimizer-0.safetensors does not match its sha256"):
        open_checkpoint(folder)  # a trainer reads it


TERMS = {"dataset": "HuggingFaceFW/fineweb", "language": "en", "licence": "ODC-By 1.0", "citation": "Somebody, 2024"}


def run_with_terms(folder, terms):
    """A run with a picture and facts about its start, on a dataset with these terms."""
    data = byte_dataset(folder / "corpus")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"terms": terms}))
    run = byte_run(folder, data)
    facts = {"command": "python train_gpt.py config/x.py --seed=1", "commit": "abc123", "uncommitted_changes": True}
    (run / "environment.json").write_text(json.dumps(facts))
    (run / "curves.png").write_bytes(b"\x89PNG")
    return run


def test_the_hub_reads_the_card(tmp_path):
    run = run_with_terms(tmp_path, TERMS)
    record = {"checkpoint": "run", "sha256": open_trained(run, CPU).sha256, "task": "boolq", "shots": 5, "limit": None}
    record |= {"metric": "acc", "score": 0.5, "stderr": 0.01, "all_metrics": {}, "requests": 2}
    others = [record | {"sha256": "0"}, record | {"limit": 3, "task": "piqa"}]
    (tmp_path / "results.json").write_text(json.dumps({"scores": [record, *others]}))
    words = ["--license", "apache-2.0", "--scores", str(tmp_path / "results.json")]
    export.main([str(run), str(tmp_path / "hf"), *words])
    page = huggingface_hub.ModelCard.load(tmp_path / "hf" / "README.md")
    data = page.data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", "en", ["HuggingFaceFW/fineweb"])
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["gpt2"])
    assert data.model_name == "run"
    results = {(r.dataset_type, r.metric_type): (r.metric_value, r.dataset_args) for r in data.eval_results}
    assert results == {
        ("HuggingFaceFW/fineweb", "loss"): (5.5, None),
        ("boolq", "acc"): (50.0, {"num_few_shot": 5}),
    }
    for line in (
        "| training command | `python train_gpt.py config/x.py --seed=1` |",
        "| commit of the training code | abc123 with uncommitted changes |",
        "| seed | 1 |",
        "| tokens | 3000 |",
        "![loss](curves.png)",
        "- licence: ODC-By 1.0",
        "- citation: Somebody, 2024",
        "Licence of these weights: apache-2.0.",
    ):
        assert line in page.text.splitlines(), line
    assert (tmp_path / "hf" / "curves.png").read_bytes() == b"\x89PNG"


def test_without_a_licence_the_card_says_so_and_guesses_none(run, exported, tmp_path):
    """The dataset of this run is the user's own, and its manifest has a source that nobody knows."""
    page = huggingface_hub.ModelCard.load(exported / "README.md")
    assert (page.data.license, page.data.language, page.data.datasets) == (None, None, None)
    assert "- licence: none recorded" in page.text.splitlines()
    assert "Licence of these weights: not stated." in page.text
    assert "curves.png" not in page.text
    export.main([str(run), str(tmp_path / "hf"), "--language", "de"])
    assert huggingface_hub.ModelCard.load(tmp_path / "hf" / "README.md").data.language == "de"


def test_the_manifest_of_an_older_preparation_gives_the_terms_of_its_source(tmp_path):
    run = run_with_terms(tmp_path, {})
    path = tmp_path / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["terms"]
    path.write_text(json.dumps(manifest | {"source": {"name": "pretokenized", "repo": "kjj0/fineweb10B-gpt2"}}))
    export.main([str(run), str(tmp_path / "hf")])
    page = huggingface_hub.ModelCard.load(tmp_path / "hf" / "README.md")
    assert page.data.datasets == ["HuggingFaceFW/fineweb"]
    assert "ODC-By 1.0" in page.text
    shutil.rmtree(tmp_path / "corpus")
    export.main([str(run), str(tmp_path / "gone")])
    page = huggingface_hub.ModelCard.load(tmp_path / "gone" / "README.md")
    assert page.data.datasets is None
    assert "- licence: none recorded: corpus had no manifest.json at the time of the export" in page.text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--license", "Apache 2"], "--license Apache 2: the hub does not know it; nearest: apache-2.0"),
        (["--language", "English"], "--language English: must be a code of ISO 639"),
        (["--scores", "nowhere.json"], "--scores nowhere.json: no such file; eval.run writes it"),
    ],
)
def test_what_the_hub_would_refuse_is_one_clear_line(run, tmp_path, words, message):
    with pytest.raises(SystemExit) as error:
        export.main([str(run), str(tmp_path / "hf"), *words])
    assert str(error.value).startswith(f"eval.export: {message}")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_other_weights_are_not_copied(run, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"scores": []}))
    with pytest.raises(SystemExit, match="no complete score of these weights"):
        export.main([str(run), str(tmp_path / "hf"), "--scores", str(tmp_path / "results.json")])


def test_the_loss_of_the_plain_weights_is_not_that_of_the_averaged_ones(run):
    trained = open_trained(run, CPU)
    assert card.losses_of(trained) == {"val_loss": 5.5, "best_val_loss": 5.5}
    averaged = replace(trained, name="run:average")
    assert card.losses_of(averaged) == {}
    assert "model-index" not in card.metadata(averaged, None, None, [])
