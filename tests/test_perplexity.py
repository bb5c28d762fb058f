"""Loss over a split or a text, compared with direct computations; pairs, compared with plain statistics."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, finish
from forked import Forked
from small_runs import byte_dataset, byte_run, small_model

from eval import perplexity
from eval.perplexity import mean_and_error, paired, spans


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    dataset = byte_dataset(root / "tokens")
    return [byte_run(root, dataset, seed, name) for seed, name in ((0, "one"), (1, "two"))]


def evaluate(runs, out, *more):
    perplexity.main([*map(str, runs), "--device", "cpu", "--out", str(out), *more])
    return json.loads(out.read_text())


@pytest.mark.parametrize("tokens", [0, 1, 2, 64, 65, 66, 200])
@pytest.mark.parametrize("stride", [1, 10, 63, 64])
def test_every_token_but_the_first_is_a_target_once(tokens, stride):
    seen = []
    for number, (begin, end, scored) in enumerate(spans(tokens, 64, stride)):
        assert 0 < end - begin <= 64
        assert number == 0 or end - begin - scored >= 0
        assert number == 0 or end == tokens - 1 or end - begin - scored == 64 - stride
        seen += range(end - scored + 1, end + 1)
    assert seen == list(range(1, tokens))


def test_the_loss_is_the_mean_over_all_tokens(runs, tmp_path):
    report = evaluate(runs[:1], tmp_path / "a.json")
    tokens = torch.tensor([256, *(ROOT / "LICENSE").read_bytes()])
    model, losses = small_model(0), []
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, 64):
            part = tokens[begin : begin + 65]
            losses.append(F.cross_entropy(model(part[None, :-1])[0].double(), part[1:], reduction="none"))
    row = report["models"][0]
    assert row["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert row["targets"] == len(tokens) - 1
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-3)  # end-of-text has no bytes
    means = np.array([part.mean().item() for part in losses[:-1]])  # the last window is shorter
    assert row["stderr"] == pytest.approx(means.std(ddof=1) / math.sqrt(len(losses)), rel=0.02)


def test_text_gives_the_loss_of_the_same_tokens_and_a_stride_gives_more_context(runs, tmp_path):
    whole = evaluate(runs[:1], tmp_path / "a.json")["models"][0]
    text = evaluate(runs[:1], tmp_path / "b.json", "--text", str(ROOT / "LICENSE"))["models"][0]
    assert text["loss"] == pytest.approx(whole["loss"], abs=1e-9)
    (tmp_path / "short.txt").write_text((ROOT / "LICENSE").read_text()[:300])
    report = evaluate(runs[:1], tmp_path / "c.json", "--text", str(tmp_path / "short.txt"), "--stride", "1")
    ids, model = torch.tensor([256, *(tmp_path / "short.txt").read_bytes()]), small_model(0)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(ids[None, max(0, i - 64) : i])[0, -1:].double(), ids[i : i + 1]).item()
            for i in range(1, len(ids))
        ]
    assert report["models"][0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_a_text_is_read_byte_for_byte_with_any_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r".encode())
    tokenizer = SimpleNamespace(eot=100_000, encode=lambda text: [70_000 + ord(c) for c in text])
    stream = perplexity.read_text([str(tmp_path / "a.txt")], SimpleNamespace(tokenizer=tokenizer))
    assert stream.parts[0].tolist() == [100_000, *(70_000 + b for b in b"one\r\ntwo\r")]
    assert stream.bytes_per_token == 1.0


def test_a_pair_is_compared_on_the_same_windows(runs, tmp_path, capsys):
    report = evaluate([*runs, runs[0]], tmp_path / "a.json")
    pair, same = report["paired"]
    losses = [m["loss"] for m in report["models"]]
    assert pair["difference"] == pytest.approx(losses[1] - losses[0])
    low, high = pair["interval95"]
    assert low < pair["difference"] < high
    assert high - low == pytest.approx(2 * 1.96 * pair["stderr"], rel=1e-3)
    assert (same["difference"], same["interval95"]) == (0, [0, 0])
    output = capsys.readouterr().out
    better = "one" if pair["difference"] > 0 else "two"
    assert (f": {better} is better" if low * high > 0 else "two - one") in output
    assert output.rstrip().endswith("indistinguishable")


def test_the_common_part_of_the_windows_cancels_in_a_pair():
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 0.5, 400)
    a, b = ((64 * (hard + rng.normal(shift, 0.02, 400))) for shift in (0.0, 0.01))
    counts = np.full(400, 64.0)
    assert mean_and_error(a, counts)[1] > 0.02
    row = paired(np.stack([a, counts], 1), np.stack([b, counts], 1))
    d = (b - a) / 64
    assert row["difference"] == pytest.approx(d.mean())
    assert row["stderr"] == pytest.approx(d.std(ddof=1) / 20)
    assert row["interval95"][0] > 0


def test_the_interval_covers_the_true_value_in_about_95_percent_of_cases():
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 65, (2000, 50)).astype(float)
    covered = 0
    for c in counts:
        d = c * 0.05 + np.sqrt(c) * rng.normal(0, 0.3, 50)
        low, high = paired(np.stack([0 * d, c], 1), np.stack([d, c], 1))["interval95"]
        covered += low < 0.05 < high
    assert 0.92 < covered / 2000 < 0.965


def test_two_processes_give_the_numbers_of_one(runs, tmp_path):
    alone = evaluate(runs, tmp_path / "one.json")
    words = [*map(str, runs), "--device", "cpu", "--out", str(tmp_path / "two.json")]
    finish(Forked(perplexity.main, words, processes=2))
    together = json.loads((tmp_path / "two.json").read_text())
    for a, b in zip(alone["models"] + alone["paired"], together["models"] + together["paired"], strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float | list) else value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stride", "65"], "--stride 65: must be at most the context, 64"),
        (["--stride", "0"], "argument --stride: 0: must be at least 1"),
        (["--batch_tokens", "0"], "argument --batch_tokens: 0: must be at least 1"),
        (["--data", "nowhere"], "dataset folder nowhere: not found"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_arguments_are_one_clear_line(runs, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        perplexity.main([str(runs[0]), "--device", "cpu", *arguments])
    assert "\n" not in str(error.value)


def test_two_runs_with_the_same_name_get_different_names(runs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(runs[1], tmp_path / "elsewhere" / "one")
    (tmp_path / "a.txt").write_text("A license.")
    pair = [runs[0], tmp_path / "elsewhere" / "one"]
    report = evaluate(pair, tmp_path / "a.json", "--text", str(tmp_path / "a.txt"))
    assert [m["name"] for m in report["models"]] == ["one", str(pair[1])]


def test_different_tokenizers_and_a_file_without_text_are_errors(runs, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match="not UTF-8 text"):
        perplexity.main([str(runs[0]), "--device", "cpu", "--text", str(tmp_path / "a.bin")])
    real = perplexity.open_trained

    def other_tokenizer(path, *rest):
        out = real(path, *rest)
        if path.endswith("two"):
            out.facts = dict(name="gpt2", vocab_size=50257)
        return out

    monkeypatch.setattr(perplexity, "open_trained", other_tokenizer)
    with pytest.raises(SystemExit, match="one reads byte tokens, two gpt2 tokens"):
        perplexity.main([*map(str, runs), "--device", "cpu"])
