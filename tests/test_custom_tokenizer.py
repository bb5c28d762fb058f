"""A tokenizer of the user, from text to scores: a tokenizer.json of Hugging Face, or a map of characters."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, ROOT

import train_gpt
from data.prepare import command as prepare
from data.shards import open_dataset, read_manifest
from data.tokenizer import get_tokenizer
from eval import export, perplexity, sample
from weights import open_trained

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
TEXT = (ROOT / "LICENSE").read_text()


def bpe_file(path: Path, special: str = "</s>", **content) -> Path:
    """A byte-level BPE of 300 ids. It has traps: it would cut texts, pad them and add tokens at their start."""
    out = tokenizers.Tokenizer(tokenizers.models.BPE())
    out.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=300, special_tokens=[special, "<s>"], initial_alphabet=alphabet, show_progress=False)
    out.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(**options))
    out.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    out.enable_truncation(5)
    out.enable_padding(length=7)
    path.write_text(json.dumps(json.loads(out.to_str()) | content))
    return path


def map_file(path: Path, text: str = TEXT, **more) -> Path:
    path.write_text(json.dumps({"stoi": {c: i for i, c in enumerate(sorted(set(text)))}} | more))
    return path


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "licence.txt").write_text(TEXT)
    return folder


def train(folder: Path, dataset: Path, vocab_size: int, *more) -> Path:
    words = [f"--data.path={dataset}", f"--log.folder={folder}", "--name=run", f"--vocab_size={vocab_size}"]
    train_gpt.main([str(CONFIG), *words, "--steps=4", "--warmup=1", "--checkpoint.every=4", "--block_size=32", *more])
    return folder / "run"


def stops(main, *arguments) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


@pytest.fixture(scope="module", params=["tokenizer.json", "map"])
def prepared(request, tmp_path_factory):
    """A dataset with a custom tokenizer, which is named once; then the file that it came from is deleted."""
    root = tmp_path_factory.mktemp("own")
    file = (bpe_file if request.param == "tokenizer.json" else map_file)(root / "own.json")
    arguments = ["text", "--root", str(text_folder(root / "text")), "--out", str(root / "tokens"), "--workers", "2"]
    prepare.main([*arguments, "--tokenizer", str(file)])
    tokenizer = get_tokenizer(str(file))
    shutil.copy(file, root / "kept.json")
    file.unlink()
    return root / "tokens", tokenizer


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A run on the dataset, which is then moved away."""
    dataset, tokenizer = prepared
    folder = train(tmp_path_factory.mktemp("runs"), dataset, tokenizer.vocab_size)
    dataset.rename(dataset.with_name("elsewhere"))
    yield folder
    dataset.with_name("elsewhere").rename(dataset)


def test_the_tokenizer_is_kept_with_the_dataset(prepared, capsys):
    folder, tokenizer = prepared
    facts = read_manifest(folder / "manifest.json")["tokenizer"]
    assert (facts["name"], facts["vocab_size"], facts["eot"]) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
    assert get_tokenizer(str(folder / "tokenizer.json")).name == tokenizer.name
    shards = open_dataset(folder, tokenizer.vocab_size).splits
    tokens = np.concatenate([np.fromfile(s.path, "<u2", offset=s.start) for s in shards["train"]])
    documents = [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))]
    assert "".join(documents).replace("</s>", "")[:200] in TEXT
    prepare.main(["verify", str(folder)])
    (folder / "tokenizer.json").rename(folder / "hidden.json")
    assert "tokenizer.json: missing, the dataset's tokenizer" in stops(prepare.main, "info", folder)
    (folder / "hidden.json").rename(folder / "tokenizer.json")


def test_a_text_becomes_ids_and_the_same_text_again(prepared):
    tokenizer = prepared[1]
    text = TEXT[:500] + ("" if tokenizer.stop is None else "</s> é <s>")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.stop is None or tokenizer.eot not in ids


def test_a_run_knows_its_tokenizer_without_its_dataset(run, prepared, tmp_path, capsys):
    trained = open_trained(run, CPU)
    assert trained.tokenizer.name == prepared[1].name
    assert trained.model.config.vocab_size == prepared[1].vocab_size
    sample.main([str(run), "--prompt", "License", "--max_tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("License")
    (tmp_path / "a.txt").write_text(TEXT[:400])
    perplexity.main([str(run), "--text", str(tmp_path / "a.txt"), "--device", "cpu"])
    ids = [prepared[1].eot, *prepared[1].encode(TEXT[:400])]
    assert f"({len(ids) - 1} tokens" in capsys.readouterr().out


def test_an_export_has_the_tokenizer_and_its_name(run, prepared, tmp_path, capsys):
    tokenizer, out = prepared[1], tmp_path / "hf"
    export.main([str(run), str(out)])
    theirs = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert theirs.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert theirs.eos_token_id == tokenizer.stop
    back = open_trained(out, CPU).tokenizer
    assert (back.name, back.eot, back.stop) == (tokenizer.name, tokenizer.eot, tokenizer.stop)
    if tokenizer.stop is None:
        with pytest.raises(ValueError, match="hf: its tokenizer cannot encode the text"):
            back.encode("é")
    (tmp_path / "a.txt").write_text(TEXT[:400])
    perplexity.main([str(run), str(out), "--text", str(tmp_path / "a.txt"), "--device", "cpu"])
    assert "indistinguishable" in capsys.readouterr().out


def test_a_checkpoint_without_its_tokenizer_says_what_to_do(run, prepared, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "tokenizer.json").rename(tmp_path / "own.json")
    line = stops(sample.main, copied)
    assert f"tokenizer {prepared[1].name}: " in line
    assert line.endswith("has no such tokenizer.json; give it with --tokenizer FILE")
    sample.main([str(copied), "--tokenizer", str(tmp_path / "own.json"), "--max_tokens", "3"])
    perplexity.main([str(copied), "--data", str(prepared[0].with_name("elsewhere")), "--device", "cpu"])
    assert " nats/token" in capsys.readouterr().out
    other = map_file(tmp_path / "other.json", TEXT + "éèà" * 200 + "".join(map(chr, range(1000, 1300))))
    assert "does not fit vocab_size=" in stops(sample.main, copied, "--tokenizer", other)


# ---- datasets of nanoGPT, which name no tokenizer


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    """nanoGPT's files of characters, and a map that was converted from its meta.pkl."""
    folder = tmp_path_factory.mktemp("nanogpt") / "shakespeare_char"
    folder.mkdir()
    tokenizer = get_tokenizer(str(map_file(folder.with_name("map.json"))))
    for split in ("train", "val"):
        np.array(tokenizer.encode(TEXT), dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(b"\x80\x04N.")
    return folder


def test_a_run_without_a_tokenizer_is_told_what_it_will_miss(nanogpt, tmp_path, capsys):
    size = len(set(TEXT))
    run = train(tmp_path, nanogpt, size)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  tokenizer")]
    assert len(said) == 1
    assert "not recorded in the dataset; give --tokenizer FILE to eval.sample, eval.run and eval.export" in said[0]
    perplexity.main([str(run), "--device", "cpu"])
    assert f"{len(TEXT) - 1:,} tokens" in capsys.readouterr().out
    map_of_run = nanogpt.with_name("map.json")
    assert "is not recorded; give --tokenizer FILE" in stops(sample.main, run)
    sample.main([str(run), "--tokenizer", str(map_of_run), "--max_tokens", "4", "--prompt", "\n"])
    export.main([str(run), str(tmp_path / "bare")])
    assert "without tokenizer files, because the tokenizer is not recorded" in capsys.readouterr().out
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["vocab_size"] == size
    export.main([str(run), str(tmp_path / "hf"), "--tokenizer", str(map_of_run)])
    assert open_trained(tmp_path / "hf", CPU).tokenizer.encode("License")
    line = stops(perplexity.main, run, "--text", CONFIG)
    assert "the tokenizer of its vocab_size" in line


def test_files_of_nanogpt_can_be_indexed_with_their_map(nanogpt, tmp_path, capsys):
    folder, own = shutil.copytree(nanogpt, tmp_path / "chars"), nanogpt.with_name("map.json")
    prepare.main(["pretokenized", "--source", str(folder), "--tokenizer", str(own)])
    run = train(tmp_path, folder, len(set(TEXT)))
    assert "  tokenizer" not in capsys.readouterr().out
    assert open_trained(run, CPU).tokenizer.decode([0]) == "\n"
    line = stops(prepare.main, "pretokenized", "fineweb_10B", "--tokenizer", own)
    assert "name their folder with --source" in line


def test_a_model_of_another_size_than_the_tokenizer(nanogpt, tmp_path, capsys):
    folder, size = shutil.copytree(nanogpt, tmp_path / "chars"), len(set(TEXT)) + 1
    own = map_file(tmp_path / "more.json", TEXT + "é")  # the text has no é
    prepare.main(["pretokenized", "--source", str(folder), "--tokenizer", str(own)])
    with pytest.raises(SystemExit, match=f"has {size} ids.* does not fit vocab_size={size - 1}; set --vocab_size"):
        train(tmp_path, folder, size - 1)
    run = train(tmp_path, folder, size + 500)
    assert f"has {size} ids, which do not fit vocab_size={size + 500}: eval.sample" in capsys.readouterr().out
    assert f"{size} ids, does not fit vocab_size={size + 500}" in stops(sample.main, run)


# ---- bad input


def test_the_separator_is_found_or_named(tmp_path):
    for special in ("<|endoftext|>", "</s>", "<eos>"):
        assert get_tokenizer(str(bpe_file(tmp_path / "a.json", special))).separator == special
    odd = str(bpe_file(tmp_path / "b.json", "[END]"))
    with pytest.raises(ValueError, match="has none of '<|endoftext|>', .* name the token that separates .* --eot"):
        get_tokenizer(odd)
    assert get_tokenizer(odd, eot="[END]").eot == 0
    with pytest.raises(ValueError, match="has no token '\\[STOP\\]'"):
        get_tokenizer(odd, eot="[STOP]")
    letters = str(map_file(tmp_path / "c.json", "ACGT|"))
    with pytest.raises(ValueError, match=r"has none of '\\n'; give the token"):
        get_tokenizer(letters)
    assert get_tokenizer(letters, eot="|").stop == 4
    with pytest.raises(ValueError, match="--eot '|': belongs to a tokenizer file; byte has its own"):
        get_tokenizer("byte", eot="|")


def test_a_named_separator_is_remembered(tmp_path):
    own, root = map_file(tmp_path / "map.json", TEXT + "|"), text_folder(tmp_path / "text")
    arguments = ["text", "--root", str(root), "--out", str(tmp_path / "tokens"), "--workers", "1"]
    prepare.main([*arguments, "--tokenizer", str(own), "--eot", "|"])
    run = train(tmp_path, tmp_path / "tokens", len(set(TEXT)) + 1)
    assert open_trained(run, CPU).tokenizer.stop == len(set(TEXT))
    assert "exists with other settings (separator)" in stops(prepare.main, *arguments, "--tokenizer", own)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x04N.", "not JSON, so no tokenizer.json and no character map"),
        (b"[1, 2]", "not a tokenizer.json of Hugging Face"),
        (b'{"model": {"type": "none"}}', "not a tokenizer.json of Hugging Face"),
        (b'{"stoi": ["a"]}', "not a character map"),
        (b'{"stoi": {"ab": 0}}', "'ab' is not one character"),
        (b'{"stoi": {"a": 0, "\\n": 2}}', "gives '.n' the id 2; the ids of 2 tokens are 0 to 1"),
        (b'{"stoi": {"a": "0", "\\n": 1}}', "gives 'a' the id '0'; the ids"),
        (b'{"stoi": {"a": 0, "\\n": 0}}', "gives one id to several tokens"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "own.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        get_tokenizer(str(tmp_path / "own.json"))
    assert str(error.value).startswith(f"{tmp_path / 'own.json'}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_ids_beyond_the_size_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match='tokenizer "gtp2": must be "byte", "gpt2" or a file'):
        get_tokenizer("gtp2")
    content = json.loads(bpe_file(tmp_path / "own.json").read_text())
    content["model"]["vocab"]["far"] = 4000
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gives 'far' the id 4000; the ids of 301 tokens are 0 to 300"):
        get_tokenizer(str(tmp_path / "own.json"))


def test_a_map_may_hold_itos_alone(tmp_path):
    for itos in (["a", "\n"], {"0": "a", "1": "\n"}):
        (tmp_path / "map.json").write_text(json.dumps({"itos": itos}))
        assert get_tokenizer(str(tmp_path / "map.json")).encode("a\na") == [0, 1, 0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_character_outside_the_map_is_named_with_its_place(tmp_path, workers):
    root, own = text_folder(tmp_path / "text"), map_file(tmp_path / "map.json")
    (root / "more.txt").write_text("Copyright\nthe\u00e9 rest")
    arguments = ["text", "--root", root, "--out", tmp_path / "tokens", "--tokenizer", own, "--workers", workers]
    line = stops(prepare.main, *arguments)
    assert "document more.txt#0: character 'é' (U+00E9) is not in the map" in line
    assert line.endswith("line 2, column 4, after 'Copyright\\nthe'")


def test_a_vocabulary_that_shards_cannot_hold_is_refused(tmp_path):
    own = map_file(tmp_path / "map.json", "\n" + "".join(map(chr, range(0x10000, 0x20001))))
    arguments = ["text", "--root", text_folder(tmp_path / "text"), "--out", tmp_path / "tokens", "--tokenizer", own]
    assert "65,538 ids, and shards hold at most 65,536; choose a smaller one" in stops(prepare.main, *arguments)
    assert not (tmp_path / "tokens.tmp").exists()
