"""Shards, manifest, tokenizers, data order and the preparation of text."""

import base64
import errno
import gzip
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT, VOCAB, environment, make_dataset, make_tokens

from data.loader import DataConfig, ReadAhead, TrainLoader, ValidationSet, Windows, permute, to_device
from data.prepare import command as prepare
from data.prepare import pydocs
from data.prepare.text import documents, text_files
from data.reading import FILES
from data.shards import (
    HEADER_BYTES,
    DataError,
    open_dataset,
    read_entry,
    read_shard_header,
    shard_problems,
    write_shard,
)
from data.tokenizer import ByteTokenizer, get_tokenizer


def loader(dataset, **changes):
    settings = dict(block_size=16, batch_size=12, vocab_size=VOCAB, seed=3) | changes
    config = settings.pop("config", DataConfig())
    return TrainLoader(open_dataset(dataset, VOCAB), config, **settings)


# ---- shards and manifest


def test_a_shard_has_the_common_header_and_can_be_read_back(tmp_path):
    tokens = make_tokens(1000)
    entry = write_shard(tmp_path / "train_000000.bin", tokens, 990)
    content = (tmp_path / "train_000000.bin").read_bytes()
    assert np.frombuffer(content, "<i4", count=256).tolist() == [20240520, 1, 1000] + [0] * 253
    assert np.array_equal(np.frombuffer(content, "<u2", offset=1024), tokens)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    shard, out = read_shard_header(tmp_path / "train_000000.bin"), np.empty(10, "<u2")
    shard.read(990, out)
    assert np.array_equal(out, tokens[990:])


def test_headerless_nanogpt_files_open(tmp_path):
    make_tokens(500).tofile(tmp_path / "train.bin")
    make_tokens(100).tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path, VOCAB)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (500, 100)
    assert dataset.bytes_per_token("val") is None
    windows = Windows(dataset.splits["train"], 16, 16)
    assert np.array_equal(windows.read(np.array([2]), VOCAB)[0], make_tokens(500)[32:49])


def remove_shard(folder):
    (folder / "train_000000.bin").rename(folder / "elsewhere")


def damage_length(folder):
    os.truncate(folder / "train_000001.bin", HEADER_BYTES + 100)


def damage_magic(folder):
    (folder / "val_000000.bin").write_bytes(b"\1" * 5000)


def damage_version(folder):
    with open(folder / "val_000000.bin", "r+b") as f:
        f.seek(4)
        f.write(b"\7")


def damage_manifest_count(folder):
    write_shard(folder / "train_000000.bin", make_tokens(77), 77)


def damage_manifest_text(folder):
    (folder / "manifest.json").write_text('{"splits": ')


def damage_manifest_fields(folder):
    (folder / "manifest.json").write_text('{"format": 1, "splits": {"train": [{"file": "x"}]}}')


def damage_manifest(key, value):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["splits"]["train"][0][key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def damage_facts(key, value):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {key: value} if key in ("source", "terms") else {"tokenizer": manifest["tokenizer"] | {key: value}}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def remove_validation(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_shard, "train_000000.bin: no such shard"),
        (damage_length, "train_000001.bin: 1124 bytes, but its header says 21024"),
        (damage_magic, r"val_000000.bin: not a token shard \(it starts with 16843009, a shard with 20240520\)"),
        (damage_version, "val_000000.bin: shard version 7, this program reads version 1"),
        (damage_manifest_count, "holds 77 tokens, but manifest.json says 10000"),
        (damage_manifest_text, "manifest.json: not a dataset manifest"),
        (damage_manifest_fields, "manifest.json: not a dataset manifest .*tokens"),
        (
            damage_manifest("max_token", "59"),
            "manifest.json: not a dataset manifest .*bad entry for 'train_000000.bin'",
        ),
        (damage_manifest("bytes", -5), "bad entry"),
        (damage_manifest("documents", "7"), "bad entry"),
        (damage_facts("vocab_size", "60"), "bad entry for the tokenizer's vocab_size"),
        (damage_facts("eot", []), "bad entry for the tokenizer's eot"),
        (damage_facts("source", ["x"]), "manifest.json: not a dataset manifest"),
        (damage_facts("terms", {"licence": 5}), "bad entry for the terms, {'licence': 5}"),
        (
            damage_facts("source", {"read": {"documents": "1", "unreadable": 0}}),
            "manifest.json: not a dataset manifest",
        ),
        (damage_manifest("file", "../x/train_000000.bin"), "bad entry for '../x/train_000000.bin'"),
        (damage_manifest("file", "train_000001.bin"), "a file is listed twice"),
        (remove_validation, r"no \*val\*.bin shards"),
    ],
)
def test_a_damaged_dataset_is_named(tmp_path, damage, message):
    folder = make_dataset(tmp_path / "d")
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_dataset(folder, VOCAB)


def test_without_a_manifest_whole_words_in_names_decide_the_split(tmp_path):
    for name in ("retrieval_train_0.bin", "pretrain.bin", "x_val_0.bin"):
        write_shard(tmp_path / name, make_tokens(100), 100)
    dataset = open_dataset(tmp_path, VOCAB)
    names = {split: [s.path.name for s in shards] for split, shards in dataset.splits.items()}
    assert names == {"train": ["retrieval_train_0.bin"], "val": ["x_val_0.bin"]}
    write_shard(tmp_path / "train_val.bin", make_tokens(100), 100)
    with pytest.raises(DataError, match="train_val.bin: its name says both train and val"):
        open_dataset(tmp_path, VOCAB)


def test_a_fingerprint_depends_on_the_tokens_and_not_on_the_folder(tmp_path):
    one, two = (open_dataset(make_dataset(tmp_path / n), VOCAB) for n in "ab")
    assert one.fingerprint() == two.fingerprint()
    other = open_dataset(make_dataset(tmp_path / "c", tokens=20_016), VOCAB)
    assert other.fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    "name, command",
    [
        ("nowhere", "pydocs"),
        ("openwebtext", "openwebtext"),
        ("fineweb_10B", "pretokenized fineweb_10B"),
        ("fineweb_edu_100B", "pretokenized fineweb_edu_100B"),
    ],
)
def test_a_missing_dataset_says_how_to_make_one(tmp_path, name, command):
    with pytest.raises(DataError, match=rf"not found; prepare one, for example: python -m data.prepare {command}$"):
        open_dataset(tmp_path / name, VOCAB)


def test_tokens_beyond_the_vocabulary_are_found_when_opening(tmp_path):
    with pytest.raises(DataError, match="token 59 .* does not fit vocab_size=50"):
        open_dataset(make_dataset(tmp_path / "with_manifest"), 50)
    make_tokens(500).tofile(tmp_path / "train.bin")
    make_tokens(100).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match="token 59 .* does not fit vocab_size=50"):
        open_dataset(tmp_path, 50)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path):
    tokens = make_tokens(500_000)
    tokens[123_456] = 9999  # between the places that are checked when opening
    tokens.tofile(tmp_path / "train.bin")
    make_tokens(100).tofile(tmp_path / "val.bin")
    windows = Windows(open_dataset(tmp_path, VOCAB).splits["train"], 16, 16)
    with pytest.raises(DataError, match="train.bin: token 9999 at offset 123456"):
        windows.read(np.arange(len(windows)), VOCAB)


def test_a_shard_truncated_while_in_use_is_named(tmp_path):
    data = loader(make_dataset(tmp_path / "d"))
    os.truncate(tmp_path / "d" / "train_000000.bin", 2000)
    with pytest.raises(DataError, match="train_000000.bin: ends .* early"):
        for step in range(20):
            data.batch(step)


# ---- reading over a network, and many files


class Faults:
    """Takes the place of os.preadv: each of the next reads fails with an error, or gives at most n bytes."""

    def __init__(self, monkeypatch, *faults):
        self.faults, self.reads, self.real = list(faults), 0, os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, handle, buffers, place):
        self.reads += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.real(handle, [buffers[0][:fault]], place)
        if fault:
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
        return self.real(handle, buffers, place)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "train_000000.bin", make_tokens(1000), 1000)
    return read_shard_header(tmp_path / "train_000000.bin")


@pytest.mark.parametrize("fault", ["EIO", "ESTALE", "EINTR", "ETIMEDOUT", 0])
def test_a_read_that_fails_for_a_while_is_repeated_on_the_file_opened_anew(shard, fault, monkeypatch):
    before, out = FILES.get(shard.path), np.empty(700, "<u2")
    Faults(monkeypatch, 1001, fault, fault)
    shard.read(300, out, waits=(0, 0))
    assert np.array_equal(out, make_tokens(1000)[300:])
    assert FILES.get(shard.path) is not before


def test_a_short_read_is_no_end_of_the_file(shard, monkeypatch):
    out = np.empty(1000, "<u2")
    faults = Faults(monkeypatch, *[7] * 20)  # an odd number, which cuts tokens
    shard.read(0, out)
    assert np.array_equal(out, make_tokens(1000))
    assert faults.reads == 21


@pytest.mark.parametrize("fault, reason", [("EIO", "Input/output error"), (0, "the file system returned no bytes")])
def test_a_read_that_fails_for_good_names_the_file_and_the_true_reason(shard, fault, reason, monkeypatch):
    faults = Faults(monkeypatch, *[fault] * 9)
    with pytest.raises(DataError, match=rf"train_000000.bin: cannot be read \({reason}\)$"):
        shard.read(0, np.empty(10, "<u2"), waits=(0, 0))
    assert faults.reads == 3
    with pytest.raises(DataError, match=r"train_000000.bin: cannot be read \(Input/output error\)$"):
        Faults(monkeypatch, *["EIO"] * 9)
        read_entry(shard, None, waits=(0,))


def test_a_file_that_is_gone_for_good_is_named(shard):
    FILES.drop(shard.path)
    shard.path.unlink()
    with pytest.raises(DataError, match=r"train_000000.bin: cannot be read \(No such file or directory\)$"):
        shard.read(0, np.empty(10, "<u2"), waits=(0,))


@pytest.mark.parametrize("hard", [64, 4096])
def test_more_shards_than_files_may_be_open(tmp_path, hard):
    """The limit that a user may raise is raised. Whatever it is, three quarters of it are left to others."""
    folder = make_dataset(tmp_path / "d", tokens=20_000, shards=200)
    script = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
from data.loader import *
from data.reading import FILES
from data.shards import open_dataset
sizes = dict(block_size=16, batch_size=600, vocab_size={VOCAB}, seed=0)
data = TrainLoader(open_dataset("{folder}", {VOCAB}), DataConfig(), **sizes)
data.batch(0)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(FILES.files))
most, FILES.most, others = FILES.most, 10**6, []
try:
    while True:
        others.append(open(os.devnull))
except OSError:
    pass
others.pop().close()  # another part of the program has opened all files but one
sums = [int(data.batch(step).sum()) for step in range(3)]
del others
FILES.most = most
print(sums == [int(data.batch(step).sum()) for step in range(3)])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{hard} {min(hard // 4, 201)}", "True"], done.stderr


# ---- files without a header


def zipf(n, size):
    """Ids as a tokenizer of text gives them: small ones are frequent, and every id occurs."""
    rng = np.random.default_rng(0)
    return np.minimum(size * rng.random(n) ** 4, size - 1).astype(np.int64)


TEXT = ROOT.joinpath("LICENSE").read_bytes()
IDS = zipf(300_000, 50257)
NORMAL = np.random.default_rng(0).normal(size=200_000)
OTHER = {
    "text": TEXT * 30,
    "html": b"<!DOCTYPE html>\n<html><body>" + "<p>404: Seite nicht gefunden \u00fc</p>\n".encode() * 4000,
    "text in latin-1": "na\u00efve caf\u00e9s\r\n".encode("latin-1") * 9000,
    "colored text": b"\x1b[31mA red line of a log file, which ends here\x1b[0m\n" * 5000,
    "short text": b"404: Not Found",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "int32 after zeros": np.r_[np.zeros(40_000), IDS].astype("<i4").tobytes(),
    "int32 with ignored ids": np.where(IDS % 7, IDS, -100).astype("<i4").tobytes(),
    "bytes as int32": np.frombuffer(TEXT * 4, np.uint8).astype("<i4").tobytes(),
    **{kind: IDS.astype(kind).tobytes() for kind in ("<u4", "<i8", ">i4", "<f2", "<f4", "<f8")},
    "characters as float16": (IDS % 65).astype("<f2").tobytes(),
    "normal float16": NORMAL.astype("<f2").tobytes(),
    "uniform float16": np.random.default_rng(0).random(99_999).astype("<f2").tobytes(),
    "small float32": (0.02 * NORMAL).astype("<f4").tobytes(),
    "npy": b"\x93NUMPY\x01\x00v\x00" + IDS.astype("<u2").tobytes(),
    "pickle": pickle.dumps(IDS.astype("<u2"), protocol=4),
    "zip": b"PK\x03\x04" + bytes(1000),
    "gzip": gzip.compress(IDS.astype("<u2").tobytes()),
}
TOKENS = {
    "GPT-2": IDS,
    "byte": np.frombuffer(TEXT * 4, np.uint8),
    "byte in UTF-16": np.frombuffer(TEXT.decode().encode("utf-16-le") * 4, "<u2"),
    "characters": IDS % 65,
    "DNA": IDS % 4,
    "two ids": IDS % 2,
    "one id": np.ones(70_000),
    "one large id": np.where(IDS % 3, 0x8000, 0),
    "zeros": np.zeros(70_000),
    "zeros at first": np.r_[np.zeros(40_000), IDS],
    "65536 ids": zipf(100_000, 65536),
    "uniform": np.random.default_rng(0).integers(0, 65536, 70_000),
    "a codebook with an offset": np.random.default_rng(0).integers(8192, 16384, 70_000),
    "another offset": np.random.default_rng(0).integers(16384, 32768, 70_000),
    "all above an offset": np.random.default_rng(0).integers(10_000, 50_257, 70_000),
    "Japanese code points": np.frombuffer(
        "\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\u3002".encode("utf-16-le") * 900, "<u2"
    ),
    "a few": np.array([0, 7, 0, 500]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", OTHER.values(), ids=OTHER)
def test_a_file_without_a_header_that_holds_no_tokens_is_refused(tmp_path, split, content):
    for name in ("train", "val"):
        IDS.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / f"{split}.bin").write_bytes(content + b"\n" * (len(content) % 2))
    with pytest.raises(
        DataError, match=rf"{split}.bin: (is|holds) .*(text|git-lfs|wider|floating|NumPy|pickle|archive)"
    ) as error:
        open_dataset(tmp_path, 1 << 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_tokens_without_a_header_are_never_taken_for_anything_else(tmp_path, tokens):
    for name in ("train", "val"):
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
    assert open_dataset(tmp_path, 1 << 16).tokens("val") == len(tokens)


def test_a_shard_of_another_name_says_what_it_is_instead(tmp_path):
    write_shard(tmp_path / "x_train_0.bin", make_tokens(100), 100)
    (tmp_path / "x_val_0.bin").write_bytes(OTHER["git-lfs"] + b"\n")
    with pytest.raises(DataError, match="x_val_0.bin: is a git-lfs pointer to the file; fetch the file: git lfs pull"):
        open_dataset(tmp_path, VOCAB)


def test_names_that_begin_with_a_dot_are_not_looked_at(tmp_path):
    folder = make_dataset(tmp_path / "d")
    (tmp_path / "raw").mkdir()
    for split in ("train", "val"):
        make_tokens(500).tofile(tmp_path / "raw" / f"{split}.bin")
    for place in (folder, tmp_path / "raw"):
        for name in (".DS_Store", "._train_000000.bin", "._val.bin", ".nfs0000000012"):
            (place / name).write_bytes(b"\0\5\x16\7")
        (place / ".cache").mkdir()
    assert shard_problems(folder) == []
    assert open_dataset(tmp_path / "raw", VOCAB).tokens("train") == 500
    prepare.main(["pretokenized", "--source", str(tmp_path / "raw"), "--tokenizer", "byte"])
    prepare.main(["verify", str(tmp_path / "raw")])


def test_a_context_longer_than_the_dataset_is_refused(dataset):
    with pytest.raises(DataError, match="train split holds a window of block_size=16384"):
        loader(dataset, block_size=16384)


# ---- order


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4097])
def test_permute_is_a_permutation_that_changes_with_seed_and_epoch(n):
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    if n >= 64:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], orders[2])
        assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 4 / n**0.5
        assert np.array_equal(permute(np.array([5]), n, 0, 0), orders[0][5:6])


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(dataset):
    data = loader(dataset, batch_size=13)
    n = len(data.windows)
    ids = np.concatenate([data.window_ids(step) for step in range(2 * n // 13 + 1)])
    assert np.array_equal(np.sort(ids[:n]), np.arange(n))
    assert np.array_equal(np.sort(ids[n : 2 * n]), np.arange(n))
    assert not np.array_equal(ids[:n], ids[n : 2 * n])


def test_windows_hold_the_tokens_of_the_stream(dataset):
    data, stream = loader(dataset), make_tokens(20_000)
    for window in (0, 623, 624, 1247):  # 624 windows in each shard of 10,000 tokens
        start = window * 16 if window < 624 else 10_000 + (window - 624) * 16
        assert np.array_equal(data.windows.read(np.array([window]), VOCAB)[0], stream[start : start + 17])


@pytest.mark.parametrize("sampling", ["permutation", "replacement"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batch_of_one_process(dataset, sampling, world_size):
    config = DataConfig(sampling=sampling)
    for step in (0, 7, 1000):
        whole = loader(dataset, config=config).batch(step)
        parts = [loader(dataset, config=config, rank=r, world_size=world_size).batch(step) for r in range(world_size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_replacement_draws_any_offset_independently_of_the_past(dataset):
    data = loader(dataset, config=DataConfig(sampling="replacement"))
    ids = np.concatenate([data.window_ids(step) for step in range(2000)])
    assert len(data.windows) == 2 * (10_000 - 16)
    assert len(np.unique(ids % 16)) == 16
    assert len(np.unique(ids)) < len(ids)
    assert ids.mean() == pytest.approx(len(data.windows) / 2, rel=0.02)


def test_reading_ahead_delivers_batches_in_order_from_any_step(dataset):
    data = loader(dataset)
    batches = ReadAhead(data, 5, pin=False)
    for step in range(5, 12):
        batch, following = batches.take()
        assert np.array_equal(batch.numpy(), data.batch(step))
        assert np.array_equal(following.numpy(), data.batch(step + 1))
    batches.close()


def test_closing_ends_the_thread_that_reads_ahead(dataset):
    """torch aborts a process that exits while another thread is inside torch."""
    batches = ReadAhead(loader(dataset), 0, pin=False)
    batches.take()
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_reading_ahead_hands_errors_to_the_consumer(dataset):
    data = loader(dataset)
    data.vocab_size = 3
    batches = ReadAhead(data, 0, pin=False)
    batch, _ = batches.take()
    assert isinstance(batch, DataError)
    assert "does not fit vocab_size=3" in str(batch)
    assert batches.error(needed=1) is batch
    assert batches.error(needed=0) is None
    batches.close()


def test_targets_follow_inputs_and_large_ids_survive_the_device_cast():
    tokens = np.array([[1, 40_000, 65_535, 7]], dtype=np.uint16)
    x, y = to_device(tokens, torch.device("cpu"))
    assert x.tolist() == [[1, 40_000, 65_535]]
    assert y.tolist() == [[40_000, 65_535, 7]]
    assert x.dtype == torch.int64


def test_validation_is_the_same_set_for_every_number_of_ranks(dataset):
    opened = open_dataset(dataset, VOCAB)
    fixed = dict(block_size=16, micro_batch=8, vocab_size=VOCAB, seed=0)
    val = ValidationSet(opened, DataConfig(val_windows=50), **fixed)
    rows = np.concatenate([val.batch(b, step=0) for b in range(len(val))])
    assert (len(val), len(rows)) == (7, 50)
    assert np.array_equal(rows, np.concatenate([val.batch(b, step=9) for b in range(len(val))]))
    assert len(np.unique(rows, axis=0)) == 50
    drawn = ValidationSet(opened, DataConfig(val_windows=50, val_sampling="random"), **fixed)
    assert not np.array_equal(drawn.batch(0, step=0), drawn.batch(0, step=9))
    assert np.array_equal(drawn.batch(0, step=9), drawn.batch(0, step=9))


def test_memory_stays_bounded_while_a_large_dataset_streams(tmp_path):
    """Every window of a 400 MB dataset is read; the process must not grow by a tenth of it."""
    for name, n in (("train.bin", 200_000_000), ("val.bin", 5000)):
        with open(tmp_path / name, "wb") as f:
            f.truncate(2 * n)  # sparse: all zeros, no disk
    script = f"""
import numpy as np
from data.loader import *
from data.shards import open_dataset
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
data = TrainLoader(open_dataset("{tmp_path}", 10), DataConfig(), block_size=1024, batch_size=480, vocab_size=10, seed=0)
data.batch(0)
before = resident()
for step in range(len(data.windows) // 480 + 1):
    data.batch(step)
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 40e6


# ---- tokenizers and text


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    text = "naïve 東京 🙂\n\0"
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eot]) == text
    assert max(tokenizer.encode(text)) < tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_gpt2_tokenizer_refuses_a_wrong_file_and_explains_a_missing_network(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    (tmp_path / "ranks").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match="sha256 is .*, GPT-2's is 306cd27f"):
        get_tokenizer("gpt2", str(tmp_path / "ranks"))
    monkeypatch.setenv("GPT2_TIKTOKEN", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere: no such file"):
        get_tokenizer("gpt2")
    monkeypatch.delenv("GPT2_TIKTOKEN")

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="could not be downloaded .*curl -o gpt2.tiktoken https.*--ranks gpt2"):
        get_tokenizer("gpt2")


def test_either_name_of_the_vocabulary_may_be_in_tiktokens_cache(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.delenv("GPT2_TIKTOKEN", raising=False)
    byte_pairs = {bytes([i]): i for i in range(256)}
    small = tiktoken.Encoding("small", pat_str=".", mergeable_ranks=byte_pairs, special_tokens={})
    for cached in ("gpt2", "r50k_base"):
        monkeypatch.setattr(tiktoken, "get_encoding", {cached: small}.__getitem__)
        assert get_tokenizer("gpt2").encode("ab") == [97, 98]


def test_gpt2_tokenizer_merges_by_rank_and_reads_special_tokens_as_text(tmp_path, monkeypatch):
    """A vocabulary of all bytes and three merges takes the place of GPT-2's, which needs a download."""
    pytest.importorskip("tiktoken")
    vocabulary = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell"]
    content = b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(vocabulary))
    content += b"\n" + b"\n".join(base64.b64encode(b"#%d" % i) + b" %d" % i for i in range(259, 50256))
    (tmp_path / "ranks").write_bytes(content)
    monkeypatch.setattr("data.tokenizer.GPT2_RANKS_SHA256", hashlib.sha256(content).hexdigest())
    tokenizer = get_tokenizer("gpt2", str(tmp_path / "ranks"))
    assert tokenizer.encode("hello") == [258, ord("o")]
    assert tokenizer.encode("o<|endoftext|>") == [*b"o<|endoftext|>"]
    for text in ("", "hello hello", "o<|endoftext|>", "naïve 東京"):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    assert tokenizer.decode([258, ord("o"), tokenizer.eot]) == "hello<|endoftext|>"


def test_text_becomes_a_dataset_that_decodes_to_the_text(tmp_path, capsys):
    root = tmp_path / "books"
    root.mkdir()
    texts = {f"{i:02d}.txt": "".join(f"line {i} {j} é\n" for j in range(40 + i)) for i in range(30)}
    for name, content in texts.items():
        (root / name).write_text(content, encoding="utf-8")
    (root / "broken.txt").write_bytes(b"fine\xff\xfe")
    command = ["text", "--root", str(root), "--out", str(tmp_path / "out"), "--shard-tokens", "5000"]
    prepare.main(command)
    assert "broken.txt: not UTF-8 (byte 4)" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "out", 257)
    assert [s.tokens for s in dataset.splits["train"][:-1]] == [5000] * (len(dataset.splits["train"]) - 1)
    pieces = []
    for split in ("train", "val"):
        stream = np.concatenate([np.fromfile(s.path, "<u2", offset=s.start) for s in dataset.splits[split]])
        pieces += ByteTokenizer().decode([i if i < 256 else 0 for i in stream.tolist()]).split("\0")[:-1]
    assert sorted("".join(pieces)) == sorted("".join(texts.values()))
    assert set("".join(texts.values()).splitlines()) == {line for p in pieces for line in p.splitlines()}
    total = sum(e["bytes"] for split in ("train", "val") for e in dataset.manifest["splits"][split])
    assert total == sum(len(t.encode()) for t in texts.values())

    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    prepare.main(command)
    assert "already prepared" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit, match=r"exists with other settings \(shard_tokens\); give --fresh"):
        prepare.main([*command[:-1], "6000"])
    prepare.main([*command[:-1], "6000", "--fresh"])
    assert open_dataset(tmp_path / "out", 257).splits["train"][0].tokens == 6000


def test_joined_pieces_of_a_text_are_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.text.READ", 1000)
    lines = "".join(f"line {i} é\n" for i in range(3000))
    texts = {"a.txt": lines, "b.txt": lines.replace("\n", " "), "c.txt": "", "d.txt": "x" * 20_000, "e.txt": "short"}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    found = list(documents(tmp_path, text_files(tmp_path, ["*.txt"])))
    for name, content in texts.items():
        pieces = [(int(n.partition("#")[2]), t) for n, t, _ in found if n.startswith(name)]
        assert "".join(t for _, t in pieces) == content
        assert [start for start, _ in pieces] == [sum(len(t) for _, t in pieces[:i]) for i in range(len(pieces))]
    assert all(t.endswith("\n") for n, t, _ in found if n.startswith("a.txt"))
    assert len([n for n, _, _ in found if n.startswith("b.txt")]) > 20
    fractions = [fraction for *_, fraction in found]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    (tmp_path / "e.txt").write_bytes(b"ab" * 1700 + "é".encode()[:1])
    assert next(documents(tmp_path, [tmp_path / "e.txt"]))[1].where.endswith("e.txt: not UTF-8 (byte 3400)")


def prepared(folder, *more):
    """The documents of `data.prepare text` on a folder, in order, as bytes without their ends."""
    return prepared_by(["text", "--root", str(folder), *more], folder.parent / "out")


def prepared_by(arguments, out):
    """The documents of a command, in order, as bytes without their ends."""
    prepare.main([*arguments, "--out", str(out), "--fresh", "--workers", "1"])
    dataset = open_dataset(out, 257)
    shards = [x for split in ("train", "val") for x in dataset.splits[split]]
    tokens = np.concatenate([np.fromfile(x.path, "<u2", offset=x.start) for x in shards])
    return bytes(tokens[tokens < 256].astype(np.uint8))


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path):
    (tmp_path / "root").mkdir()
    content = b"one\r\ntwo\rthree\n" * 4000
    (tmp_path / "root" / "a.txt").write_bytes(b"\xef\xbb\xbf" + content)
    assert len(prepared(tmp_path / "root")) == len(content)
    found = list(documents(tmp_path / "root", [tmp_path / "root" / "a.txt"]))
    assert "".join(text for _, text, _ in found).encode() == content


def test_text_files_in_any_case_each_once_and_none_that_is_hidden(tmp_path):
    root = tmp_path / "root"
    names = ["a.txt", "B.TXT", ".git/c.txt", ".venv/d.txt", "x/.ipynb_checkpoints/e.txt", ".f.txt", "drafts/g.txt"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link.txt").symlink_to(root / "a.txt")
    os.link(root / "a.txt", root / "twice.txt")

    def found(*arguments):
        return [p.relative_to(root).as_posix() for p in text_files(root, *arguments)]

    assert found() == found(["**/*.txt"]) == ["B.TXT", "a.txt", "drafts/g.txt"]
    assert found(["**/*.txt"], ["drafts", "b*"]) == ["B.TXT", "a.txt"]
    assert found(["**/*.txt"], ["*/g.*", "B.TXT"]) == ["a.txt"]
    assert found([".git/*.txt"]) == [".git/c.txt"]


@pytest.mark.parametrize(
    "globs, names",
    [
        ([], "b.txt c/d.TXT"),
        (["**/*.{txt,md}"], "a.MD b.txt c/d.TXT"),
        (["*.md", "c/*.txt"], "a.MD c/d.TXT"),
        (["{a,c/{d,e}}.*"], "a.MD c/d.TXT c/e.rst"),
    ],
)
def test_globs_add_up_and_may_have_braces_and_what_is_left_out_is_said(tmp_path, capsys, globs, names):
    root = tmp_path / "root"
    for name in ("a.MD", "b.txt", "c/d.TXT", "c/e.rst", ".hidden.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<{name}> " * 900)
    content = prepared(root, "--val-fraction=0.4", *(f"--glob={glob}" for glob in globs))
    taken = names.split()
    assert sorted(set(re.findall(rb"<(.*?)>", content))) == sorted(name.encode() for name in taken)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(
        f"{root}: {len(taken)} of 4 files match --glob {' '.join(globs) or '**/*.txt'}; left out: 1 ."
    )
    prepared(root, "--val-fraction=0.4", "--glob=*", "--glob=c/*")
    assert "left out" not in capsys.readouterr().out


def test_the_root_may_be_a_file(tmp_path, capsys):
    (tmp_path / "notes.md").write_text("to be or not to be\n" * 600)
    arguments = ["text", "--root", str(tmp_path / "notes.md")]
    assert prepared_by(arguments, tmp_path / "out") == b"to be or not to be\n" * 600
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="notes.md is a file; give a folder or no --glob"):
        prepare.main([*arguments, "--glob", "*.md"])
    with pytest.raises(SystemExit, match="nowhere: no such file or folder"):
        prepare.main(["text", "--root", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt.gz"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_records_are_read_as_such_and_not_as_raw_text(tmp_path, kind, column, capsys):
    root, rows = tmp_path / "root", [f'<{i}> says "no"\n' for i in range(400)]
    root.mkdir()
    lines = "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode() + b"{broken\n"
    if kind == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.table({"id": range(400), column: rows}), root / "a.parquet")
    elif kind == "txt.gz":
        for i, row in enumerate(rows):
            (root / f"{i:03d}.txt.gz").write_bytes(gzip.compress(row.encode()))
    else:
        (root / f"a.{kind}").write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    options = ["--glob", f"*.{kind}", "--column", column]
    content = prepared(root, *options)
    assert sorted(content.decode().splitlines(keepends=True)) == sorted(rows)
    assert ("a." + kind + ": line 401: not JSON" in capsys.readouterr().err) == kind.startswith("jsonl")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["val"][0]["documents"] > 3


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    try:
        for i in range(20):
            (root / os.fsdecode(b"caf\xe9%d.txt" % i)).write_text(f"<{i}>")
    except OSError:
        pytest.skip("this file system has no such names")
    content = prepared(root, "--val-fraction", "0.5")
    assert all(f"<{i}>".encode() in content for i in range(20))
    (root / os.fsdecode(b"bad\xe9.txt")).write_bytes(b"\xff")
    assert len(prepared(root, "--val-fraction", "0.5")) == len(content)  # named on the console and skipped


@pytest.mark.parametrize("content", ["to be or not to be\n" * 10_000, "to be or not to be " * 10_000])
def test_one_large_file_gives_both_splits(tmp_path, content):
    (tmp_path / "input.txt").write_text(content)
    prepare.main(["text", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    dataset = open_dataset(tmp_path / "out", 257)
    assert 0.01 < dataset.tokens("val") / dataset.tokens("train") < 0.2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--root", "/nowhere"], "--root /nowhere: no such file or folder"),
        (["--root", "{tmp}"], 'no file under .* matches "\\*\\*/\\*.txt"; it holds 1 .md$'),
        (["--root", "{tmp}", "--glob", "/etc/*"], '--glob "/etc/\\*": .*; give a pattern like'),
        (["--root", "{tmp}", "--glob", "*.md"], "no document fell into the"),
        (["--root", "{tmp}", "--val-fraction", "2"], "--val_fraction 2.0: must be between 0 and 1"),
    ],
)
def test_preparation_errors_are_one_line(tmp_path, arguments, message):
    (tmp_path / "one.md").write_text("word")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    with pytest.raises(SystemExit, match=message):
        prepare.main(["text", *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_pydocs_is_prose_in_a_reproducible_order():
    found = list(pydocs.documents())
    assert found[:60] == list(islice(pydocs.documents(), 60))
    assert [fraction for *_, fraction in found] == sorted({fraction for *_, fraction in found})
    assert 0 < found[0][2] < 0.01 < 0.99 < found[-1][2] <= 1
    prose = [(name, text) for name, text, _ in found]
    names = [name for name, _ in prose]
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {"numpy", "python", "torch"}
    assert not any("/tests/" in name or "site-packages" in name for name in names)
    assert 8e6 < sum(len(text) for _, text in prose) < 20e6
    textwrap = dict(prose)["python/textwrap.py"]
    assert "Object for wrapping/filling text." in textwrap
    assert "def wrap" not in textwrap
    paragraphs = [p for _, text in prose for p in text.strip("\n").split("\n\n")]
    assert len(set(paragraphs)) > 0.99 * len(paragraphs)
