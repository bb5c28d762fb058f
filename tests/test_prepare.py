"""Preparing corpora: content of the shards, interruptions, workers, checks, and error messages of one line."""

import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment
from fake_hub import COMMIT, REFUSALS, FakeHub

from data import shards
from data.loader import DataConfig, TrainLoader
from data.prepare import build, output, sources
from data.prepare import command as prepare
from data.prepare.corpora import CORPORA, PRETOKENIZED
from data.prepare.hub import answers, hub_problem
from data.prepare.split import NanoGPT
from data.shards import HEADER_BYTES, DataError, open_dataset, shard_problems, write_shard
from data.terms import terms_of
from data.tokenizer import ByteTokenizer, facts_of, pieces

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
EOT = 256
UNUSUAL = ["", "naïve 東京 🙂\n\0", "<|endoftext|>", " ", "x" * 3]


def texts(n=600):
    """Documents of different lengths, some of them unusual."""
    return [UNUSUAL[i % 5] if i % 7 == 0 else f"document {i} " * (1 + i * 37 % 50) for i in range(n)]


def write_parquet(folder: Path, documents: list[str], files=3, group=40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        part = documents[i * len(documents) // files : (i + 1) * len(documents) // files]
        table = pa.table({"url": ["u"] * len(part), "text": pa.array(part, pa.string())})
        pq.write_table(table, folder / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=group)
    return folder


def command(corpus: str, source: Path, out: Path, *more) -> list[str]:
    common = ["--source", str(source), "--tokenizer", "byte", "--shard-tokens", "10000", "--workers", "1"]
    return [corpus, *common, "--out", str(out), *more]


def stops(arguments: list[str]) -> str:
    """The message of a failing command."""
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments)
    assert isinstance(caught.value.code, str)
    assert "Traceback" not in caught.value.code
    return caught.value.code


def stream(folder: Path, split: str) -> np.ndarray:
    found = open_dataset(folder, 257).splits[split]
    return np.concatenate([np.fromfile(s.path, "<u2", offset=s.start) for s in found])


def documents_in(tokens: np.ndarray, eot: str) -> list[str]:
    """The documents of a stream that starts or ends with end-of-text."""
    cuts = np.flatnonzero(tokens == EOT)
    parts = np.split(tokens, cuts + (eot == "after"))
    parts = parts[:-1] if eot == "after" else parts[1:]
    return [ByteTokenizer().decode(p[p != EOT].tolist()) for p in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("corpus") / "parquet", texts())


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """An uninterrupted preparation on one process."""
    out = tmp_path_factory.mktemp("whole") / "owt"
    prepare.main(command("openwebtext", corpus, out))
    return out


# ---- content of the shards


def test_openwebtext_has_end_of_text_after_documents_and_nanogpts_validation_documents(whole):
    held_out = set(np.random.default_rng(2357).permutation(600)[:1].tolist())  # ceil(0.0005 * 600)
    expected = {
        "train": [t for i, t in enumerate(texts()) if i not in held_out],
        "val": [t for i, t in enumerate(texts()) if i in held_out],
    }
    for split in ("train", "val"):
        assert stream(whole, split)[-1] == EOT
        assert documents_in(stream(whole, split), "after") == expected[split]
    train = open_dataset(whole, 257).splits["train"]
    assert [s.tokens for s in train[:-1]] == [10_000] * (len(train) - 1)
    entries = json.loads((whole / "manifest.json").read_text())["splits"]
    assert sum(e["documents"] for e in entries["train"]) == 599
    assert sum(e["bytes"] for e in entries["train"]) == sum(len(t.encode()) for t in expected["train"])


def test_the_split_is_that_of_the_datasets_library():
    datasets = pytest.importorskip("datasets")
    for n in (4001, 20_000):
        rows = datasets.Dataset.from_dict({"row": range(n)})
        theirs = rows.train_test_split(test_size=0.0005, seed=2357)["test"]["row"]
        assert sorted(theirs) == NanoGPT(n).val.tolist()


def test_fineweb_edu_has_end_of_text_before_documents_and_its_first_shard_for_validation(corpus, tmp_path):
    prepare.main(command("fineweb_edu", corpus, tmp_path / "edu"))
    val, train = stream(tmp_path / "edu", "val"), stream(tmp_path / "edu", "train")
    assert (len(val), val[0]) == (10_000, EOT)
    assert documents_in(np.concatenate([val, train]), "before") == texts()
    names = sorted(p.name for p in (tmp_path / "edu").glob("*.bin"))
    assert names[0] == "train_000001.bin"
    assert names[-1] == "val_000000.bin"


def write_jsonl(path: Path, documents: list[str]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "\n".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(documents)).encode()
    content = content.replace(b"\n", b"\n\n", 1)  # a blank line is no document
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as f:
            f.write(content)
    else:
        path.write_bytes(content)
    return content


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_make_the_same_shards_as_parquet(whole, tmp_path, suffix):
    for i in range(2):
        write_jsonl(tmp_path / "source" / f"part{i}{suffix}", texts()[i * 300 : (i + 1) * 300])
    prepare.main(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    same = {name: content for name, content in contents(whole).items() if name.endswith(".bin")}
    assert {n: c for n, c in contents(tmp_path / "out").items() if n.endswith(".bin")} == same


def test_text_files_are_a_document_each_in_the_order_of_their_names(tmp_path):
    for i, text in enumerate(texts(100)):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{i:03d}.txt").write_bytes(text.encode())
    prepare.main(command("fineweb_edu", tmp_path / "source", tmp_path / "out"))
    both = np.concatenate([stream(tmp_path / "out", "val"), stream(tmp_path / "out", "train")])
    assert documents_in(both, "before") == texts(100)


def test_one_enormous_document_and_ten_thousand_tiny_ones(tmp_path):
    documents = ["ab " * 1_000_000, *(f"{i}" for i in range(10_000))]
    write_parquet(tmp_path / "source", documents, files=1, group=5000)
    prepare.main(command("fineweb_edu", tmp_path / "source", tmp_path / "out", "--shard-tokens", "1000000"))
    both = np.concatenate([stream(tmp_path / "out", "val"), stream(tmp_path / "out", "train")])
    assert documents_in(both, "before") == documents


def test_a_large_row_group_is_continued_in_the_middle(corpus, whole, tmp_path, monkeypatch):
    write_parquet(tmp_path / "source", texts(), files=1, group=1000)
    monkeypatch.setattr("data.prepare.formats.BATCH_ROWS", 7)
    monkeypatch.setattr("data.prepare.formats.CHUNK_BYTES", 5000)
    original = build.write_shard
    monkeypatch.setattr(build, "write_shard", lambda *a: stop_at(original, 8, *a))
    stops(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    file, row = json.loads((tmp_path / "out.tmp" / "progress.json").read_text())["position"]
    assert file == 0
    assert 0 < row < 600
    monkeypatch.setattr(build, "write_shard", original)
    prepare.main(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    same = {n: c for n, c in contents(whole).items() if n.endswith(".bin")}
    assert {n: c for n, c in contents(tmp_path / "out").items() if n.endswith(".bin")} == same


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude42"}\n')
    prepare.main(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    found = {*documents_in(stream(tmp_path / "out", "train"), "after")}
    found |= {*documents_in(stream(tmp_path / "out", "val"), "after")}
    assert found == {"a\ufffdb", "🙂"}


def test_long_texts_are_cut_only_where_no_token_can_cross():
    tiktoken = pytest.importorskip("tiktoken")
    import random

    from data.tokenizer import GPT2_PATTERN

    merged = (b"  ", b" a", b"\n\n", b"ab", b"'s", b"a1", b"1a", b"a!", b"s'")
    ranks = {pair: i for i, pair in enumerate([*(bytes([i]) for i in range(256)), *merged])}
    encoding = tiktoken.Encoding("test", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    chance, alphabet = random.Random(0), ["a", "b", " ", "\n", "'s", "'", "1", "é", "٣", "\u0301", "\u00a0", "\t", "!"]
    for _ in range(300):
        text = "".join(chance.choices(alphabet, k=200))
        parts = list(pieces(text, size=7))
        assert "".join(parts) == text
        assert [t for part in parts for t in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)
    assert len(list(pieces("word " * 100, size=7))) > 30
    assert len(list(pieces("a1+b2/C3" * 100, size=7))) > 30


def test_prepared_shards_reach_the_loader(whole):
    dataset = open_dataset(whole, 257)
    data = TrainLoader(dataset, DataConfig(), block_size=64, batch_size=8, vocab_size=257, seed=0)
    tokens, first = stream(whole, "train"), dataset.splits["train"][0].tokens
    window = int(data.window_ids(0)[0])
    shard, offset = window // ((first - 1) // 64), window % ((first - 1) // 64) * 64
    assert np.array_equal(data.batch(0)[0], tokens[shard * first + offset : shard * first + offset + 65])


# ---- interruption and workers


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_does_not_change_a_byte(corpus, whole, tmp_path, workers):
    prepare.main(command("openwebtext", corpus, tmp_path / "owt", "--workers", str(workers)))
    assert contents(tmp_path / "owt") == contents(whole)


@pytest.mark.parametrize("done", [False, True])
def test_a_crash_at_any_write_changes_nothing(corpus, whole, tmp_path, monkeypatch, done):
    """The first start dies at its first write, the second at its second, and so on, before the write or after it."""
    original, starts, writes = shards.write_durably, 0, [0]

    def dying(path, *parts):
        writes[0] += 1
        if writes[0] < starts:
            return original(path, *parts)
        if done:
            original(path, *parts)
        raise KeyboardInterrupt

    for module in (shards, build, output):
        monkeypatch.setattr(module, "write_durably", dying)
    messages = set()
    while not (tmp_path / "owt").exists() and starts < 100:
        starts, writes[0] = starts + 1, 0
        try:
            prepare.main(command("openwebtext", corpus, tmp_path / "owt"))
        except SystemExit as stop:
            messages.add(stop.code)
    assert messages == {"data.prepare: interrupted; the same command continues"}
    assert starts >= 10
    assert contents(tmp_path / "owt") == contents(whole)


def test_kills_change_nothing_and_leave_no_process(corpus, whole, tmp_path, capsys):
    out = tmp_path / "owt"
    arguments = command("openwebtext", corpus, out, "--workers", "2")
    twice = [signal.SIGINT, signal.SIGINT]  # an impatient user
    for shard, signals in ((3, [signal.SIGKILL]), (9, twice)):
        process = subprocess.Popen([sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, env=environment())
        deadline = time.monotonic() + 60
        while not (output.temporary(out) / f"train_{shard:06d}.bin").exists() and process.poll() is None:
            assert time.monotonic() < deadline
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        for sent in signals:
            process.send_signal(sent)
        process.wait(60)
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    prepare.main(arguments)
    assert contents(out) == contents(whole)


def test_a_continued_preparation_does_not_read_from_the_start(corpus, whole, tmp_path, monkeypatch):
    out = tmp_path / "owt"
    write, count = shards.write_shard, [0]

    def dying(*arguments):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(build, "write_shard", dying)
    stops(command("openwebtext", corpus, out))
    position = json.loads((output.temporary(out) / "progress.json").read_text())["position"]
    assert position > [0, 3]
    seen = []
    chunks_of = sources.chunks_of
    monkeypatch.setattr(sources, "chunks_of", lambda *a: (seen.append(a[0].name), chunks_of(*a))[1])
    prepare.main(command("openwebtext", corpus, out))
    assert len(seen) == 3 - position[0]
    assert contents(out) == contents(whole)


def test_other_settings_do_not_continue_a_preparation(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build.Preparation, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, tmp_path / "owt"))
    monkeypatch.undo()
    message = stops(command("openwebtext", corpus, tmp_path / "owt", "--shard-tokens", "20000"))
    assert "owt.tmp was started with other settings (shard_tokens); repeat them or give --fresh" in message
    prepare.main(command("openwebtext", corpus, tmp_path / "owt", "--shard-tokens", "20000", "--fresh"))
    assert "exists with other settings (shard_tokens)" in stops(command("openwebtext", corpus, tmp_path / "owt"))


def test_the_same_command_without_fresh_continues_an_interrupted_replacement(
    corpus, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "owt"
    prepare.main(command("openwebtext", corpus, out, "--shard-tokens", "20000"))
    monkeypatch.setattr(build, "publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    message = stops(command("openwebtext", corpus, out, "--fresh"))
    assert message == "data.prepare: interrupted; the same command, without --fresh, continues"
    monkeypatch.undo()
    prepare.main(command("openwebtext", corpus, out))
    assert contents(out) == contents(whole)
    assert not output.temporary(out).exists()
    capsys.readouterr()
    for name in (".owt.replaced", "tmp-.owt.replaced"):  # killed before, and while, it deleted the old dataset
        shutil.copytree(whole, tmp_path / name)
        prepare.main(command("openwebtext", corpus, out))
        assert "already prepared" in capsys.readouterr().out
        assert contents(out) == contents(whole)
        assert [p.name for p in tmp_path.iterdir()] == ["owt"]


def test_names_that_begin_with_a_dot_are_left_alone(corpus, whole, tmp_path, monkeypatch):
    """In a dataset, in an unfinished preparation, and while either is replaced."""
    out, names = tmp_path / "owt", (".DS_Store", "._train_000000.bin", ".nfs0000000012", ".gitignore")
    prepare.main(command("openwebtext", corpus, out, "--shard-tokens", "20000"))
    for name in names:
        (out / name).write_text(f"old {name}")
    monkeypatch.setattr(build, "publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, out, "--fresh"))
    (output.temporary(out) / "._buffered-000001").write_text("new")
    stops(command("openwebtext", corpus, out, "--fresh"))
    monkeypatch.undo()
    prepare.main(command("openwebtext", corpus, out))
    expected = {name: f"old {name}".encode() for name in names} | {"._buffered-000001": b"new"}
    assert contents(out) == contents(whole) | expected
    prepare.main(["verify", str(out)])
    prepare.main(command("openwebtext", corpus, out))


# ---- no file of the user is ever deleted


def test_a_folder_with_files_of_the_user_is_never_replaced(corpus, tmp_path):
    """The source, two folders of the user, a dataset with notes in it, and a dataset that was indexed in place."""
    shutil.copytree(corpus, tmp_path / "source")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "thesis.tex").write_text("precious")
    (tmp_path / "also.tmp").mkdir()
    (tmp_path / "also.tmp" / "train_000000.bin").write_text("precious")
    for name in ("lock", "tokenizer.json", "fetched"):
        (tmp_path / f"{name}.tmp").mkdir()
        (tmp_path / f"{name}.tmp" / name).write_text("precious")
    (tmp_path / ".waits.replaced").mkdir()  # the name of a dataset that is being replaced
    (tmp_path / ".waits.replaced" / "thesis.tex").write_text("precious")
    prepare.main(command("openwebtext", corpus, tmp_path / "made"))
    (tmp_path / "made" / "notes.txt").write_text("precious")
    for name in ("x_val_0.bin", "x_train_1.bin"):
        (tmp_path / "indexed").mkdir(exist_ok=True)
        write_shard(tmp_path / "indexed" / name, np.array([50256, 1], dtype=np.uint16), None)
    prepare.main(["pretokenized", "--source", str(tmp_path / "indexed")])
    (tmp_path / "link").symlink_to(tmp_path / "private")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    ours = ("also", "made", "indexed", "waits", "lock", "tokenizer.json", "fetched")
    for out in ("source", "private", "private/..", "link", "source/../private", *ours):
        for fresh in ((), ("--fresh",)):
            message = stops(command("fineweb_edu", tmp_path / "source", tmp_path / out, *fresh))
            assert "give another --out" in message or "not a file of a preparation; move it away" in message
            assert "\n" not in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["/", ".."])
def test_paths_that_cannot_be_a_dataset(corpus, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = stops(command("openwebtext", corpus, Path(name), "--fresh"))
    assert re.search("give the name of a folder to be made|not a file of a preparation", message), message


def test_a_fresh_start_does_not_delete_the_folder_of_a_running_preparation(corpus, tmp_path):
    folder = output.begin(tmp_path / "owt", {"source": {}})
    with output.locked(tmp_path / "owt"):
        message = stops(command("openwebtext", corpus, tmp_path / "owt", "--fresh"))
        assert "another preparation is writing there" in message
        assert folder.exists()


def test_two_preparations_of_one_folder(corpus, tmp_path):
    with output.locked(tmp_path / "owt"):
        message = stops(command("openwebtext", corpus, tmp_path / "owt"))
    assert "another preparation is writing there" in message


def test_without_workers_one_per_core_that_this_process_may_use(corpus, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(prepare, "build", lambda out, source, settings, shards: asked.append(shards.workers))
    monkeypatch.setattr(prepare, "describe", str)
    arguments = command("openwebtext", corpus, tmp_path / "owt")
    prepare.main(arguments)
    prepare.main([a for a in arguments if a not in ("--workers", "1")])
    assert asked == [1, 3]


def test_a_worker_that_dies_is_reported(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.workers._start_worker", dying_worker)
    message = stops(command("openwebtext", corpus, tmp_path / "owt", "--workers", "2"))
    assert "one of 2 workers died" in message


def dying_worker(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- verify and info


def damage_hash(folder):
    with open(folder / "train_000002.bin", "r+b") as f:
        f.seek(HEADER_BYTES + 100)
        f.write(b"\7\0")


def damage_half(folder):
    os.truncate(folder / "train_000001.bin", 5000)


def damage_missing(folder):
    (folder / "val_000000.bin").unlink()


def damage_foreign(folder):
    write_shard(folder / "train_000099.bin", np.arange(9, dtype=np.uint16), 9)


def damage_manifest(folder):
    text = (folder / "manifest.json").read_text()
    entry = json.loads(text)["splits"]["train"][2]
    (folder / "manifest.json").write_text(
        text.replace(f'"max_token": {entry["max_token"]}', '"max_token": 7', 1).replace(
            f'"documents": {entry["documents"]}\n', '"documents": 1234\n'
        )
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_manifest, "train_000000.bin: manifest.json says max_token 7, it is 256; manifest.json was changed"),
        (damage_manifest, "manifest.json says documents 1234, it is"),
        (damage_manifest, "owt: 600 documents were read, its shards hold"),
        (damage_hash, "train_000002.bin: its sha256 is not the manifest's"),
        (damage_half, "train_000001.bin: 5000 bytes, but its header says 21024"),
        (damage_missing, "val_000000.bin: no such shard"),
        (damage_foreign, "train_000099.bin: not in the manifest"),
    ],
)
def test_verify_names_what_is_wrong(corpus, tmp_path, capsys, damage, message):
    out = tmp_path / "owt"
    prepare.main(command("openwebtext", corpus, out))
    prepare.main(["verify", str(out)])
    assert "headers, counts, sha256 agree" in capsys.readouterr().out
    damage(out)
    assert message in stops(["verify", str(out)])


def test_ranks_that_divide_the_work_find_every_problem_once(corpus, tmp_path):
    out = tmp_path / "owt"
    prepare.main(command("openwebtext", corpus, out))
    for number in (2, 3, 7):
        with open(out / f"train_{number:06d}.bin", "r+b") as f:
            f.seek(HEADER_BYTES)
            f.write(b"\1\0")
    (out / "train_000099.bin").write_bytes(b"")
    found = [problem for rank in range(3) for problem in shard_problems(out, rank=rank, ranks=3)]
    assert sorted(found) == sorted(shard_problems(out))
    assert len(found) == 4


def test_verify_without_a_manifest_says_how_to_get_one(tmp_path):
    write_shard(tmp_path / "train_0.bin", np.arange(9, dtype=np.uint16), 9)
    assert "python -m data.prepare pretokenized --source" in stops(["verify", str(tmp_path)])


def test_info_states_documents_tokens_shards_and_epochs(whole, capsys):
    prepare.main(["info", str(whole), "--budget", "1e6"])
    printed = capsys.readouterr().out
    tokens = len(stream(whole, "train"))
    assert f"{tokens:,} tokens, 599 documents, {-(-tokens // 10_000)} shards" in printed
    assert f"{1e6 / tokens:.2f} with 1,000,000 tokens of training" in printed
    assert "val_seed        2357" in printed
    assert "licence         none recorded" in printed  # these files are the user's own
    assert "--budget nan: must be a number of tokens above 0" in stops(["info", str(whole), "--budget", "nan"])
    assert "/nowhere: no such folder" in stops(["info", "/nowhere"])


def test_a_manifest_has_the_terms_of_its_source(tmp_path):
    entry = write_shard(tmp_path / "train_000000.bin", np.zeros(8, dtype=np.uint16), 8)
    facts, splits = facts_of(ByteTokenizer()), {"train": [entry], "val": []}
    for source, dataset, words in (
        ({"name": "openwebtext", "repo": "Skylion007/openwebtext"}, "Skylion007/openwebtext", "CC0 1.0"),
        ({"name": "pretokenized", "repo": "kjj0/finewebedu10B-gpt2"}, "HuggingFaceFW/fineweb-edu", "Common Crawl"),
        ({"name": "openwebtext", "repo": "somebody/else"}, None, "none recorded"),
        ({"name": "text", "root": "/books"}, None, "none recorded"),
        ({"name": "pydocs"}, None, "PSF-2.0"),
    ):
        shards.write_manifest(tmp_path, facts, source, splits)
        terms = shards.read_manifest(tmp_path / "manifest.json")["terms"]
        assert terms.get("dataset") == dataset
        assert words in terms["licence"]


def test_every_corpus_that_a_command_names_has_licence_and_citation():
    repositories = [corpus.repo for corpus in CORPORA.values()] + [repo for repo, _ in PRETOKENIZED.values()]
    page = (ROOT / "docs" / "data.md").read_text()
    for repository in repositories:
        terms = terms_of({"repo": repository})
        assert terms.keys() == {"dataset", "language", "licence", "citation"}, repository
        assert f"[{terms['dataset']}](https://huggingface.co/datasets/{terms['dataset']})" in page


def test_info_describes_shards_without_a_manifest(tmp_path, capsys):
    np.array([0, 7, 0, 500], dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.array([3, 0, 0, 0], dtype=np.uint16).tofile(tmp_path / "val.bin")
    prepare.main(["info", str(tmp_path), "--budget", "8"])
    printed = capsys.readouterr().out
    assert "python -m data.prepare pretokenized --source" in printed
    assert "4 tokens, 1 shards, largest token 500, 50.0% of them 0" in printed
    assert "4 tokens, 1 shards, largest token 3, 75.0% of them 0" in printed
    assert "2.00 with 8 tokens of training" in printed
    np.zeros(400, dtype=np.int64).tofile(tmp_path / "val.bin")
    np.arange(400, dtype=np.int64).tofile(tmp_path / "train.bin")
    assert "train.bin: holds wider integers than uint16; write it again" in stops(["info", str(tmp_path)])


def test_info_states_the_epochs_of_a_config(whole, capsys):
    shape = ["--vocab_size=257", "--block_size=64", "--val_windows=3", "--batch_size=20"]
    config = [str(ROOT / "config" / "gpt2_small.py"), *shape, "--warmup=1"]
    prepare.main(["info", str(whole), *config, "--tokens=1280000"])
    printed = capsys.readouterr().out
    windows = sum((s.tokens - 1) // 64 for s in open_dataset(whole, 257).splits["train"])
    assert f"{20_000 / windows:.2f} with gpt2_small: 1,000 steps = 1,280,000 tokens" in printed
    assert "3 of 6 windows of 64 tokens" in printed
    prepare.main(["info", str(whole), *config, "--tokens=1280000", "--sampling=replacement"])
    tokens = sum(s.tokens - 64 for s in open_dataset(whole, 257).splits["train"])
    assert f"{1_280_000 / tokens:.2f} with gpt2_small" in capsys.readouterr().out
    assert "config: stepz: unknown key; nearest: steps" in stops(["info", str(whole), config[0], "--stepz=1"])
    assert "config/none.py: no such config file; there are: " in stops(["info", str(whole), "config/none.py"])
    assert "does not fit vocab_size=100" in stops(["info", str(whole), config[0], "--vocab_size=100"])
    with pytest.raises(SystemExit):
        prepare.main(["verify", str(whole), "--stepz=1"])


# ---- the hub, through its own client and a local server


@pytest.fixture
def online(monkeypatch):
    """The hub's client without HF_HUB_OFFLINE, which the other tests set."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online, tmp_path, monkeypatch):
    root = tmp_path / "hub"
    write_parquet(root / "data", texts())
    for i, name in enumerate(("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin")):
        write_shard(root / name, np.array([50256, i, 2, 3], dtype=np.uint16), None)
    server = FakeHub(root)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "")
    yield server
    server.server.shutdown()
    server.server.server_close()


def hub_command(out: Path, *more, repo="some/data") -> list[str]:
    common = ["--tokenizer", "byte", "--shard-tokens", "10000", "--workers", "1"]
    return ["openwebtext", "--repo", repo, "--out", str(out), *common, *more]


def test_the_hub_gives_the_same_shards_and_the_commit_is_kept(hub, whole, tmp_path, monkeypatch):
    """This holds after an interruption, too, and no fetched file is left behind."""
    out = tmp_path / "out"
    original = build.write_shard
    monkeypatch.setattr(build, "write_shard", lambda *a: stop_at(original, 8, *a))
    stops(hub_command(out))
    assert json.loads((output.temporary(out) / "progress.json").read_text())["source"]["revision"] == COMMIT
    monkeypatch.setattr(build, "write_shard", original)
    prepare.main(hub_command(out))
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert (source["revision"], source["documents"], source["repo"]) == (COMMIT, 600, "some/data")
    local, fetched = contents(whole), contents(out)
    assert fetched.keys() == local.keys()
    assert all(fetched[n] == local[n] for n in fetched if n.endswith(".bin"))


def test_files_of_the_hub_are_not_written_to_the_disk(hub, tmp_path, monkeypatch):
    """The folder holds only shards and records, and the cache of the libraries does not grow."""
    from huggingface_hub.constants import HF_HUB_CACHE

    names, add = set(), build.Preparation.add

    def look(self, chunk, result):
        names.update(p.name for p in (tmp_path / "out.tmp").rglob("*"))
        add(self, chunk, result)

    monkeypatch.setattr(build.Preparation, "add", look)
    cached = set(Path(HF_HUB_CACHE).rglob("*"))
    prepare.main(hub_command(tmp_path / "out"))
    assert set(Path(HF_HUB_CACHE).rglob("*")) == cached
    assert all(re.fullmatch(r"(train|val)_\d+\.bin|progress\.json|buffered-\d+", name) for name in names), names


def test_json_lines_of_the_hub_make_the_same_shards(hub, whole, tmp_path):
    write_jsonl(hub.root / "lines" / "a.jsonl.gz", texts())
    prepare.main(hub_command(tmp_path / "out", "--pattern", "lines/*"))
    local, fetched = contents(whole), contents(tmp_path / "out")
    assert all(fetched[n] == local[n] for n in local if n.endswith(".bin"))
    assert "some/data: fineweb_val_000000.bin: not a .parquet" in stops(
        hub_command(tmp_path / "other", "--pattern", "*val*")
    )


def test_a_damaged_parquet_file_is_named_on_this_machine_and_on_the_hub(hub, tmp_path):
    path = hub.root / "data" / "train-00001-of-00003.parquet"
    with open(path, "r+b") as f:
        f.write(b"PAR1" + bytes(path.stat().st_size // 2))
    message = stops(command("openwebtext", path.parent, tmp_path / "local"))
    assert re.search("train-00001-of-00003.parquet: cannot be read .*; fetch it again$", message)
    message = stops(hub_command(tmp_path / "hub_out"))
    assert re.search("/some/data: data/train-00001-of-00003.parquet cannot be read .*; the same command", message)
    assert "network" not in message


def test_an_error_in_our_code_is_not_reported_as_a_network_error():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(KeyError), answers("some/data", "main"):
        {}["x"]


def stop_at(write, number, path, *more):
    if f"{number:06d}" in path.name:
        raise KeyboardInterrupt
    return write(path, *more)


@pytest.mark.parametrize(
    "repo, more, message",
    [
        ("moved/data", [], "moved/data does not exist .* give its new name with --repo"),
        ("gated/data", [], "gated/data is gated: accept its terms there, then log in"),
        ("some/data", ["--revision", "nope"], "some/data has no revision nope; give a commit or branch"),
        ("some/data", ["--pattern", "*.csv"], 'no file matches "\\*.csv"; give another --pattern'),
        (
            "some/data",
            ["--column", "body"],
            'some/data: data/.* needs one text column "body"; it has url .*; choose one',
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, repo, more, message):
    found = stops(hub_command(tmp_path / "out", *more, repo=repo))
    assert re.search(message, found), found
    assert "\n" not in found


def test_no_network_is_one_line_that_names_the_alternative(online, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = stops(hub_command(tmp_path / "out"))
    assert "http://127.0.0.1:9 does not answer" in message
    assert "no network? The same command continues; files you have can be given with --source DIR" in message


@pytest.mark.parametrize("secret", ["user:s3cret@", "user:s3c@s3cret@", "s3cret@"])
def test_a_password_in_the_address_of_the_hub_is_in_no_message(hub, tmp_path, monkeypatch, secret):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.wrong_sha = True
    messages, ready = [], ["pretokenized", "--repo", "some/data", "--pattern", "fineweb_*.bin"]
    for address in (hub.address, "http://127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", address.replace("://", f"://{secret}"))
        for repo in ("some/data", *REFUSALS):
            messages.append(stops(hub_command(tmp_path / "out", "--revision", "nope", repo=repo)))
        messages.append(stops([*ready, "--out", str(tmp_path / "ready")]))
    with pytest.raises(DataError) as raised, answers("some/data", "main", "a.parquet"):
        raise OSError(f"cannot read http://{secret}127.0.0.1:9/a.parquet?token=s3cret")
    messages += [str(raised.value), hub_problem()]
    assert [m for m in messages if "s3c" in m] == []
    assert messages[-1] == "http://***@127.0.0.1:9 does not answer"


def test_a_hub_that_does_not_answer_is_not_asked_again(hub, monkeypatch):
    """Otherwise its libraries try for half a minute, for each dataset of each task."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert hub_problem() is None
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub_problem() == "http://127.0.0.1:9 does not answer"
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (True, True)
    assert hub_problem() == "HF_HUB_OFFLINE is set"


def test_ready_made_shards_are_fetched_checked_and_indexed(hub, tmp_path, capsys):
    arguments = ["pretokenized", "--repo", "some/data", "--pattern", "fineweb_*.bin", "--out", str(tmp_path / "ready")]
    hub.wrong_sha = True
    assert "is damaged (its sha256 is wrong)" in stops(arguments)
    hub.wrong_sha = False
    prepare.main([*arguments, "--shards", "1", "--fresh"])
    assert sorted(contents(tmp_path / "ready")) == [
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
    ]
    prepare.main(["verify", str(tmp_path / "ready")])
    prepare.main([*arguments, "--shards", "1"])
    assert "already prepared" in capsys.readouterr().out
    dataset = open_dataset(tmp_path / "ready", 50257)
    assert (dataset.tokens("train"), dataset.bytes_per_token("train")) == (4, None)
    assert dataset.manifest["splits"]["val"][0]["documents"] == 1


def test_what_was_fetched_is_deleted_before_a_dataset_gets_its_name(hub, tmp_path, monkeypatch):
    out = tmp_path / "ready"
    arguments = ["pretokenized", "--repo", "some/data", "--pattern", "fineweb_*.bin", "--out", str(out)]
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", fails_with(errno.EIO, str(out)))
        assert stops(arguments) == f"data.prepare: {out}: Input/output error"
    assert not out.exists()
    prepare.main(arguments)
    assert all(name.endswith((".bin", ".json")) for name in contents(out))


def test_local_shards_are_indexed_in_place(tmp_path, capsys):
    for name in ("x_val_0.bin", "x_train_1.bin"):
        write_shard(tmp_path / name, np.array([50256, 1], dtype=np.uint16), None)
    prepare.main(["pretokenized", "--source", str(tmp_path)])
    prepare.main(["verify", str(tmp_path)])
    assert "has a manifest.json; check it with" in stops(["pretokenized", "--source", str(tmp_path)])
    (tmp_path / "manifest.json").unlink()
    write_shard(tmp_path / "x_test_0.bin", np.array([50256, 2], dtype=np.uint16), None)
    raw = open_dataset(tmp_path, 50257).tokens("train")
    prepare.main(["pretokenized", "--source", str(tmp_path)])
    assert open_dataset(tmp_path, 50257).tokens("train") == 2  # a test split stays out
    assert open_dataset(tmp_path, 50257).tokens("train") == raw
    (tmp_path / "manifest.json").unlink()
    write_shard(tmp_path / "x_train_2.bin", np.array([60_000], dtype=np.uint16), None)
    assert "holds token 60000, which gpt2 with 50257 ids lacks" in stops(["pretokenized", "--source", str(tmp_path)])
    assert "name one of fineweb_10B" in stops(["pretokenized", "nothing"])
    assert "--shards: 0: must be from 1 to" in stops(["pretokenized", "fineweb_10B", "--shards", "0"])
    assert "--repo and --pattern go together" in stops(["pretokenized", "--repo", "some/data"])


# ---- bad input


def test_a_parquet_without_text(tmp_path):
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "source" / "a.parquet")
    message = stops(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    assert 'needs one text column "text"; it has body (string), id (int64); choose one with --column' in message
    message = stops(command("openwebtext", tmp_path / "source", tmp_path / "out", "--column", "id"))
    assert 'needs one text column "id"; it has body (string), id (int64)' in message
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "source" / "a.parquet")
    message = stops(command("openwebtext", tmp_path / "source", tmp_path / "out"))
    assert 'a.parquet: needs one text column "text"; it has text (string), text (string)' in message
    (tmp_path / "source" / "a.parquet").write_bytes(b"PAR1 nothing")
    assert "a.parquet: cannot be read" in stops(command("openwebtext", tmp_path / "source", tmp_path / "out"))


def test_documents_that_are_not_text_are_skipped_named_and_counted(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 3, 7], "<i4").tobytes()), pa.py_buffer(b"ab\xffgood")]
    )
    pq.write_table(pa.table({"text": broken}), source / "a.parquet")
    (source / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    (source / "c.txt").write_bytes(b"abc\xfe")
    prepare.main(command("fineweb_edu", source, tmp_path / "out", "--shard-tokens", "5"))
    error = capsys.readouterr().err
    assert re.search(f"[\n\r]skipped {source}/a.parquet: row 0: not UTF-8 \\(byte 2\\)", error)
    assert f"skipped {source}/b.jsonl: line 2: not UTF-8 (byte 10)" in error
    assert f"skipped {source}/c.txt: not UTF-8 (byte 3)" in error
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["read"] == {"documents": 5, "unreadable": 3}


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"body": "a"}', 'line 1: no string "text" in it (it has: body); choose one with --column'),
        (b"\n", "the source holds no document that can be read"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(content)
    assert message in stops(command("fineweb_edu", tmp_path / "source", tmp_path / "out"))


def test_json_lines_without_text_are_skipped_and_a_byte_order_mark_is_no_text(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": null}\n{"text": "two"}\n{"text": "cut o')
    (source / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    prepare.main(command("fineweb_edu", source, tmp_path / "out", "--shard-tokens", "4"))
    error = capsys.readouterr().err
    assert "a.jsonl: line 2: no text" in error
    assert "a.jsonl: line 4: not JSON" in error
    dataset = open_dataset(tmp_path / "out", 257)
    tokens = np.concatenate(
        [np.fromfile(s.path, "<u2", offset=s.start) for x in ("val", "train") for s in dataset.splits[x]]
    )
    assert bytes(tokens[tokens < 256].astype(np.uint8)) == b"onetwothree"


def test_a_compressed_file_that_was_cut_off(tmp_path):
    write_jsonl(tmp_path / "source" / "a.jsonl.gz", texts())
    path = tmp_path / "source" / "a.jsonl.gz"
    os.truncate(path, path.stat().st_size // 2)
    assert "a.jsonl.gz: cannot be read (Truncated" in stops(
        command("openwebtext", tmp_path / "source", tmp_path / "out")
    )


def test_sources_that_cannot_be_used(tmp_path):
    assert "--source /nowhere: no such folder" in stops(command("openwebtext", Path("/nowhere"), tmp_path / "out"))
    assert f"--source {tmp_path}: holds no .parquet" in stops(command("openwebtext", tmp_path, tmp_path / "out"))
    assert "--workers: 0: must be from 1 to 4096" in stops(command("openwebtext", tmp_path, tmp_path, "--workers", "0"))
    (tmp_path / "a.txt").write_text("short")
    message = stops(command("fineweb_edu", tmp_path, tmp_path / "out"))
    assert "no document fell into the train split; give more text or a smaller --shard_tokens" in message
    assert not output.temporary(tmp_path / "out").exists()


def test_a_foreign_file_and_a_damaged_shard_in_an_unfinished_folder(corpus, tmp_path, monkeypatch):
    out = tmp_path / "owt"
    monkeypatch.setattr(build.Preparation, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, out))
    for name in ("other.bin", "notes.tmp"):
        (output.temporary(out) / name).write_bytes(b"1")
        assert f"{name}: not a file of a preparation; move it away" in stops(command("openwebtext", corpus, out))
        (output.temporary(out) / name).unlink()
    os.truncate(output.temporary(out) / "train_000001.bin", 3000)
    message = stops(command("openwebtext", corpus, out))
    assert "train_000001.bin: 3000 bytes, but its header says 21024" in message


def test_a_full_disk_keeps_what_was_written(corpus, whole, tmp_path):
    """A limit on file size, smaller than a shard, takes the place of a full disk."""
    out = tmp_path / "owt"
    limited = f"ulimit -f 12; exec {sys.executable} -m data.prepare " + " ".join(command("openwebtext", corpus, out))
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"owt.tmp/\S+'; make room there, the same command continues$", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    prepare.main(command("openwebtext", corpus, out))
    assert contents(out) == contents(whole)


def fails_with(number: int, *filename):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number), *filename)

    return fail


def test_a_quota_is_like_a_full_disk_and_neither_is_a_missing_network(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "write_shard", fails_with(errno.EDQUOT, "owt.tmp/train_000000.bin"))
    message = stops(command("openwebtext", corpus, tmp_path / "owt"))
    assert message.endswith(
        "Disk quota exceeded: 'owt.tmp/train_000000.bin'; make room there, the same command continues"
    )
    pytest.importorskip("huggingface_hub")
    for fail in (fails_with(errno.EDQUOT), fails_with(errno.EROFS, "fetched/a.bin"), fails_with(errno.ENOENT, "a.bin")):
        with pytest.raises(OSError, match="Errno"), answers("some/data", "main"):
            fail()


def test_a_source_that_cannot_be_read_to_its_end_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to be or not to be")
    monkeypatch.setattr("data.prepare.text.text_pieces", fails_with(errno.EIO))
    message = stops(["text", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert message.endswith("a.txt: cannot be read (Input/output error); the same command continues")


def test_a_folder_that_is_something_else(corpus, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "exists and has no manifest.json" in stops(command("openwebtext", corpus, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    prepare.main(command("openwebtext", corpus, tmp_path / "empty"))
    assert (tmp_path / "empty" / "manifest.json").exists()


def test_a_wrong_tokenizer_file(corpus, tmp_path):
    pytest.importorskip("tiktoken")
    (tmp_path / "ranks").write_text("IQ== 0\n")
    arguments = command("openwebtext", corpus, tmp_path / "out", "--tokenizer", "gpt2", "--ranks", f"{tmp_path}/ranks")
    assert "sha256 is" in stops(arguments)
    assert not (tmp_path / "out").exists()


# ---- bad records


BAD = [b'{"text": null}', b'{"text": 5}', b'{"body": "a"}', b'["a"]', b'"a"', b'{"text": "cut o', b"\xff", b"[" * 10**5]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_bad_records_between_good_ones_are_skipped_named_and_counted(tmp_path, capsys, compression):
    lines = [b'{"text": "one"}', *BAD, b'{"text": "two"}', b'{"text": "cut off at the en']
    content = b"\n".join(lines)
    if compression:
        content = pa.compress(content, {".gz": "gzip", ".zst": "zstd"}[compression], asbytes=True)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / f"a.jsonl{compression}").write_bytes(content)
    prepare.main(command("fineweb_edu", tmp_path / "source", tmp_path / "out", "--shard-tokens", "4"))
    error = capsys.readouterr().err
    reasons = ["no text", 'no string "text"', 'no string "text" in it (it has: body)', 'no string "text"'] + [
        'no string "text"'
    ]
    for number, reason in enumerate([*reasons, "not JSON", "not UTF-8 (byte 0)", "not JSON"], 2):
        assert f"a.jsonl{compression}: line {number}: {reason}" in error
    assert f"line {len(lines)}: not JSON" in error
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["read"] == {"documents": 11, "unreadable": 9}
    assert documents_in(np.concatenate([stream(tmp_path / "out", s) for s in ("val", "train")]), "before") == [
        "one",
        "two",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_too_many_bad_records_stop_a_preparation_and_a_larger_limit_continues_it(tmp_path, kind):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rows = [None if i % 5 == 0 else f"document {i}" for i in range(1000)]  # a fifth
    if kind == "jsonl":
        (source / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), source / "a.parquet")
    arguments = command("fineweb_edu", source, out)
    assert "103 of 512 documents cannot be read, more than --max_skipped 0.1 allows; the last one: " in stops(arguments)
    assert "--max_skipped 2.0: must be from 0 to 1" in stops([*arguments, "--max-skipped", "2"])
    arguments[arguments.index("--shard-tokens") + 1] = "1000"
    prepare.main([*arguments, "--fresh", "--max-skipped", "0.3"])
    assert json.loads((out / "manifest.json").read_text())["source"]["read"] == {"documents": 1000, "unreadable": 200}


# ---- which files are read


def test_suffixes_may_have_capital_letters_and_hidden_folders_and_second_links_are_left_out(tmp_path, capsys):
    source = tmp_path / "source"
    for name in (
        "a.JSONL",
        "b.Txt",
        "c.TXT.GZ",
        ".git/d.txt",
        "x/.ipynb_checkpoints/a.jsonl",
        "drafts/e.txt",
        "f.bak.txt",
    ):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b'{"text": "json"}\n' if "json" in name.lower() else name.encode()
        path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    pq.write_table(pa.table({"text": ["rows"]}), source / "g.PARQUET")
    (source / "link.txt").symlink_to(source / "b.Txt")
    os.link(source / "b.Txt", source / "same.txt")
    (source / "gone.txt").symlink_to(source / "nothing")
    (source / "notes.md").write_text("no corpus file")
    excluded = ["--exclude", "drafts", "--exclude=*.bak.*"]
    prepare.main(command("fineweb_edu", source, tmp_path / "out", "--shard-tokens", "9", *excluded))
    assert f"{source}: 4 of 5 files end in .parquet, .jsonl, " in (said := capsys.readouterr().out.splitlines()[0])
    assert said.endswith("; left out: 1 .md")
    tokens = np.concatenate([stream(tmp_path / "out", split) for split in ("val", "train")])
    assert documents_in(tokens, "before") == ["json", "b.Txt", "c.TXT.GZ", "rows"]
    assert "other settings (exclude, files, files_sha256)" in stops(
        command("fineweb_edu", source, tmp_path / "out", "--shard-tokens", "9")
    )


def test_control_characters_in_names_are_printed_as_codes(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out\x1b[31m\r"
    source.mkdir()
    (source / "a\x1b]0;title\x07\nskipped b.txt").write_bytes(b"\xff")
    (source / "c\x9b2J.jsonl").write_text('{"\\u001b[2Jkey": 1}\n{"text": "good"}\n' + '{"text": "good"}\n' * 20)
    prepare.main(command("fineweb_edu", source, out, "--shard-tokens", "30"))
    error = capsys.readouterr().err.replace("\r", "")  # the progress bar returns to the start of its line
    assert error.isprintable() or not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", error)
    assert "a\\x1b]0;title\\x07\\x0askipped b.txt: not UTF-8 (byte 0)\n" in error
    assert 'c\\x9b2J.jsonl: line 1: no string "text" in it (it has: \\x1b[2Jkey)' in error
    assert "preparing out\\x1b[31m\\x0d:" in error
    message = stops(command("fineweb_edu", tmp_path / "no\x1b[31m", out))
    assert "no\\x1b[31m: no such folder" in message


ODD_PROGRESS = [
    *("[]", "{", "{}", '{"source": 3}', '{"source": {}, "files": 7}', "\ud800", "null", "[" * 10**5, "1e999"),
    *('{"source": {"revision": 5}}', '{"source": {"documents": "x"}}', '{"source": [1]}', '{"source": null}'),
]


@pytest.mark.parametrize("content", ODD_PROGRESS, ids=range(len(ODD_PROGRESS)))
def test_a_damaged_progress_file_is_named(corpus, tmp_path, monkeypatch, content):
    out = tmp_path / "owt"
    monkeypatch.setattr(build.Preparation, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, out))
    path = output.temporary(out) / "progress.json"
    path.write_text(content, errors="surrogatepass")
    assert f"{path}: damaged (" in stops(command("openwebtext", corpus, out))


@pytest.mark.parametrize(
    "key, value",
    [
        *(("position", 3), ("position", [[]]), ("position", ["x"]), ("position", None)),
        *(("buffered", {}), ("buffered", 5), ("buffered", None)),
        *(("streams", [1]), ("streams", None), ("streams", [{}, {}]), ("streams", {}), ("documents", None)),
        ("streams", [dict(buffered=-1, buffered_bytes=0, shards=[])] * 2),
        ("streams", [dict(buffered=0, buffered_bytes=0, shards=[{"file": "x"}])] * 2),
        ("streams", [dict(buffered=0, buffered_bytes=0, shards=5)] * 2),
    ],
)
def test_a_progress_file_that_somebody_changed_is_named(corpus, tmp_path, monkeypatch, key, value):
    out = tmp_path / "owt"
    monkeypatch.setattr(build.Preparation, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, out))
    path = output.temporary(out) / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert f"{path}: damaged (" in stops(command("openwebtext", corpus, out))


@pytest.mark.parametrize("name", ["/dev/zero", "../buffered-000000", ".", ""])
def test_a_progress_file_that_names_a_file_elsewhere_is_refused(corpus, tmp_path, monkeypatch, name):
    out = tmp_path / "owt"
    monkeypatch.setattr(build.Preparation, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    stops(command("openwebtext", corpus, out))
    path = output.temporary(out) / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"buffered": {"file": name, "sha256": "0"}}))
    assert "is missing or damaged; start over with --fresh" in stops(command("openwebtext", corpus, out))
