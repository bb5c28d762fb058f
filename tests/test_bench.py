"""Every bench runs in its smoke mode, measures both sides, and leaves a table."""

import json

import pytest

from bench import optimizer_step, prepare, report, train_step


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def rows(folder):
    (path,) = folder.glob("*.jsonl")
    assert path.with_suffix(".md").read_text().count("\n|") >= 4
    facts, *measured = map(json.loads, path.read_text().splitlines())
    assert facts.keys() >= {"hardware", "torch", "date", "threads"}
    return measured


def test_train_step(results):
    train_step.main(["--smoke"])
    assert [r["unit"] for r in rows(results)] == ["x", "x", "%", "million tokens/s"]
    assert all(r["value"] > 0 for r in rows(results))


def test_optimizer_step(results):
    optimizer_step.main(["--smoke"])
    measured = {r["optimizer"]: r for r in rows(results)}
    assert measured["AdamW fused (torch)"]["to_fused"] == 1
    assert measured["Muon + AdamW (torch)"]["to_torch_muon"] == 1
    assert all(r["seconds"] > 0 for r in measured.values())
    assert {"MARS-AdamW", "Muon", "MARS-M clipped", "MARS-M one buffer"} <= measured.keys()


def test_prepare(results):
    pytest.importorskip("pyarrow")
    prepare.main(["--smoke"])
    measured = {r["side"]: r for r in rows(results)}
    timed = [r["MB_s"] for side, r in measured.items() if "wall_s" in r or side.startswith("tiktoken")]
    assert len(timed) == 5
    assert all(rate > 0 for rate in timed)
    assert {f"projected: {c} on {n} cores" for c in prepare.CORPORA for n in (16, 64)} < measured.keys()
