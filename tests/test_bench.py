"""Every bench runs in its smoke mode, measures both sides, and leaves a table."""

import contextlib
import json
import math
import os
import subprocess
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench import (
    correctness,
    generation,
    gpu_page,
    ladder,
    memory,
    micro,
    micro_optimizers,
    optimizer_step,
    prepare,
    train_step,
)
from bench.peers import plain_newton_schulz
from bench.report import Report
from bench.runs import MICRO, in_own_process
from bench.timing import SIZES, Session, TimeIsUp, shape_of, time_limit
from bench.trace import by_kernel, gpu_events, idle_fraction
from config.load import load_config
from optimizers.newton_schulz import orthogonalize


def session_in(folder):
    return Session("rows", Namespace(smoke=True, folder=folder))


def smoke_rows(bench, folder, *arguments):
    """The rows of a bench in its smoke mode."""
    bench.main(["--smoke", f"--folder={folder}", *arguments])
    return rows(folder)


def rows(folder):
    """The measured rows in the files of a bench."""
    (path,) = folder.glob("*.jsonl")
    assert path.with_suffix(".md").read_text().count("\n|") >= 4
    facts, *measured = map(json.loads, path.read_text().splitlines())
    assert facts.keys() >= {"hardware", "torch", "date", "threads"}
    return measured


def test_train_step(tmp_path):
    measured = smoke_rows(train_step, tmp_path)
    assert [r["unit"] for r in measured] == ["x", "x", "%", "million tokens/s"]
    assert all(r["value"] > 0 for r in measured)


def test_optimizer_step(tmp_path):
    measured = {r["optimizer"]: r for r in smoke_rows(optimizer_step, tmp_path)}
    assert measured["AdamW fused (torch)"]["to_fused"] == 1
    assert measured["Muon + AdamW (torch)"]["to_torch_muon"] == 1
    assert all(r["seconds"] > 0 for r in measured.values())
    assert {"MARS-AdamW", "Muon", "MARS-M clipped", "MARS-M one buffer"} <= measured.keys()


def test_generation(tmp_path):
    measured = {r["how"]: r for r in smoke_rows(generation, tmp_path)}
    assert [r["new_tokens"] for r in measured.values()] == [16, 16, 128]
    assert measured["no cache"]["speedup"] == 1
    assert all(r["seconds"] > 0 for r in measured.values())


def test_prepare(tmp_path):
    pytest.importorskip("pyarrow")
    measured = {r["side"]: r for r in smoke_rows(prepare, tmp_path)}
    timed = [r["MB_s"] for side, r in measured.items() if "wall_s" in r or side.startswith("tiktoken")]
    assert len(timed) == 6
    assert all(rate > 0 for rate in timed)
    assert {f"projected: {c} on {n} cores" for c in prepare.CORPORA for n in (16, 64)} < measured.keys()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_prepare_memory(tmp_path):
    pytest.importorskip("pyarrow")
    measured = smoke_rows(prepare, tmp_path, "--memory")
    assert [r["side"].split()[1] for r in measured] == ["documents", "one", "one"]
    assert all(r["together_GB"] >= r["parent_GB"] * 0.9 > 0.02 for r in measured)
    assert all(r["worker_GB"] > 0.02 for r in measured)


def test_micro(tmp_path):
    found = {(r["block"], r["what"], r.get("kind")): r for r in smoke_rows(micro, tmp_path)}
    count = {block: sum(b == block for b, *_ in found) for block in micro.BLOCKS}
    assert count == {"gemm": 15, "sdpa": 4, "ce": 5, "ns": 4, "optim": 7}
    for key, row in found.items():
        if row["note"]:
            assert key[1].split()[0] in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "flex_attention,", "torch's")
            assert "ms" not in row
        elif "copy" not in key[1]:
            assert 0 < row["ms"] < math.inf
    losses = [r for r in found.values() if r["block"] == "ce" and not r["note"]]
    assert len(losses) >= 4
    for row in losses:
        assert row["loss"] == pytest.approx(losses[0]["loss"], rel=4e-3)  # one variant rounds the loss to bf16
        assert row["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-2)
    updates = {what: r for (block, what, _), r in found.items() if block == "optim" and "copy" not in what}
    assert micro_optimizers.BYTES.keys() == updates.keys()
    alone = found["optim", "copy, and Newton-Schulz alone", None]["newton_schulz_ms"]
    for what, r in updates.items():  # a busy machine may measure more for Newton-Schulz alone than for a whole step
        elementwise = r["ms"] - (alone if what in micro_optimizers.ORTHOGONAL else 0)
        assert r["to_floor"] == pytest.approx(elementwise / r["floor_ms"])


def test_plain_newton_schulz_is_the_same_iteration():
    matrices = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(matrices, dtype=torch.float32)
    assert (plain_newton_schulz(matrices).float() - expected).norm() < 0.05 * expected.norm()


def test_floating_point_operations_of_newton_schulz():
    """20 m^2 n + 10 m^3 over every matrix of a layer: qkv, proj, and both of the MLP."""
    for size, teraflop in (("124M", 1.52), ("1558M", 55.05)):
        d = shape_of(size).n_embd
        by_hand = shape_of(size).n_layer * sum(20 * d * d * n * d + 10 * d**3 for n in (3, 1, 4, 4))
        flops = micro_optimizers.newton_schulz_flops(shape_of(size))
        assert flops == by_hand == pytest.approx(1e12 * teraflop, rel=1e-2)


def test_a_measurement_that_fails_leaves_a_note_and_the_bench_goes_on(tmp_path):
    session = session_in(tmp_path)

    def fail(error):
        raise error

    session.row(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), what="a")
    session.row(lambda: fail(RuntimeError("no such kernel\nat x")), what="b")
    session.row(lambda: time.sleep(5), what="c", budget=0.01)
    assert session.row(lambda: dict(ms=1.0), what="d") == dict(ms=1.0)
    session.ends = 0
    session.row(lambda: dict(ms=1.0), what="e")
    notes = {r["what"]: r["note"] for r in session.report.rows}
    assert notes["a"] == "out of memory"
    assert notes["b"] == "not measured: no such kernel"
    assert notes["c"] == "not measured: took longer than 0.01 s"
    assert notes["d"] == ""
    assert "of the bench are over" in notes["e"]
    kept = [json.loads(line) for line in session.report.path.read_text().splitlines()[1:]]
    assert kept == session.report.rows  # each row is written at once


def test_two_benches_at_once_leave_no_mixture_of_rows(tmp_path):
    first, second = Report("x", tmp_path, side=1), Report("x", tmp_path, side=2)
    first.add(n=1)
    second.add(n=2)
    first.add(n=3)
    facts, *rows = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert (facts["side"], rows) == (1, [dict(n=1), dict(n=3)])  # of the one that wrote last
    second.add(n=4)
    facts, *rows = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert (facts["side"], rows) == (2, [dict(n=2), dict(n=4)])
    second.table()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl", ".md"]


def test_a_library_cannot_catch_the_time_limit_as_an_exception():
    with pytest.raises(TimeIsUp), time_limit(0.01):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_real_run_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"bench\.micro: needs a CUDA GPU; --smoke"):
        micro.main(["gemm", f"--folder={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_correctness(tmp_path):
    checks = {r["what"]: r for r in smoke_rows(correctness, tmp_path)}
    assert len(checks) == 13
    on_a_gpu = {what for what, r in checks.items() if r["result"] == "not measured"}
    assert {what.split()[0] for what in on_a_gpu} == {"waits", "fraction", "copies"}
    for what in checks.keys() - on_a_gpu:
        assert (checks[what]["result"], checks[what]["note"]) == ("ok", "")
        assert 0 <= checks[what]["found"] <= checks[what]["bound"]
    assert checks["bf16 eager against float32 eager: gradient of the worst tensor, relative"]["found"] > 1e-4


def test_a_check_that_fails_ends_with_status_1(tmp_path, monkeypatch):
    def one_of_each(session, *rest):
        correctness.check(session, "at the bound", 0, lambda: 0)
        correctness.check(session, "above it", 1.0, lambda: 1.1)
        correctness.check(session, "no number", 1.0, lambda: math.nan)
        correctness.check(session, "an error", 1.0, lambda: torch.zeros(2) @ torch.zeros(3))
        correctness.check(session, "no GPU", 1.0, lambda: "needs a CUDA GPU")

    for name in ("check_numbers", "check_steady"):
        monkeypatch.setattr(correctness, name, lambda *rest: None)
    monkeypatch.setattr(correctness, "check_resume", one_of_each)
    with pytest.raises(SystemExit) as stop:
        correctness.main(["--smoke", f"--folder={tmp_path}"])
    assert stop.value.code == 1
    assert [r["result"] for r in rows(tmp_path)] == ["ok", "FAIL", "FAIL", "FAIL", "not measured"]


def test_relative_errors_of_loss_and_gradients():
    reference = {"loss": torch.tensor(2.0), "a": torch.ones(4), "b": torch.ones(100)}
    found = reference | {"loss": torch.tensor(2.01), "a": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    assert correctness.loss_error(found, reference) == pytest.approx(0.005)
    assert correctness.gradient_error(found, reference) == pytest.approx(0.1)


def test_idle_time_and_kernels_of_a_trace(tmp_path):
    def event(cat, name, start, duration):
        return dict(ph="X", cat=cat, name=name, ts=start, dur=duration)

    events = [
        event("kernel", "gemm", 100, 50),
        event("kernel", "gemm", 160, 30),  # overlaps the next
        event("gpu_memcpy", "Memcpy DtoH", 180, 10.2),
        event("kernel", "tiny", 199.5, 0.5),
        event("gpu_user_annotation", "Optimizer.step", 0, 1000),
        event("cpu_op", "aten::mm", 0, 1000),
        dict(ph="M", name="process_name"),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(dict(traceEvents=events)))
    on_gpu = gpu_events(path)
    assert len(on_gpu) == 4
    assert idle_fraction(on_gpu) == pytest.approx(1 - (50 + 30.2 + 0.5) / 100)
    assert by_kernel(on_gpu) == pytest.approx({"gemm": 80 / 90.7, "Memcpy DtoH": 10.2 / 90.7})


def test_memory_reports_the_estimate_of_every_optimizer(tmp_path):
    found = {r["optimizer"]: r for r in smoke_rows(memory, tmp_path)}
    assert found.keys() == {"adamw", "mars_m"}
    assert all(row["size"] == "tiny" and 0 < row["estimate"] < 0.01 for row in found.values())


def test_ladder(tmp_path):
    found = {r["rung"]: r for r in smoke_rows(ladder, tmp_path)}
    assert found.keys() == {*ladder.RUNGS, "best against nanogpt", "best against materialized"}
    best = found["best"]["tokens_per_s"]
    for peer in ("nanogpt", "materialized"):
        assert found.pop(f"best against {peer}")["speed_ratio"] == best / found[peer]["tokens_per_s"]
    for name, r in found.items():
        numbers = ("tokens_per_s", "memory_gb", "step_ms", "optimizer_ms", "optimizer_share", "compile_s")
        assert all(0 < r[key] < math.inf for key in numbers), name
        assert r["optimizer_ms"] < r["step_ms"]
        assert r["note"] == ""
        assert r["mfu"] is None  # unknown for a CPU
        assert ("data_wait_ms" in r) == (name not in ladder.PEERS)
        # tokens/s of a step of 480 sequences, computed from a step of `sequences`
        whole = (r["step_ms"] - r["optimizer_ms"]) * 480 / r["sequences"] + r["optimizer_ms"]
        assert r["tokens_per_s"] == pytest.approx(1e3 * 480 * 64 / whole)
        assert r["optimizer_share"] == pytest.approx(r["optimizer_ms"] / whole)


def test_a_rung_runs_in_its_own_process(tmp_path):
    figures = ladder.measure_elsewhere("nanogpt", "124M", smoke=True, micro=2)
    assert figures["tokens_per_s"] > 0
    session = session_in(tmp_path)
    session.row(lambda: ladder.measure_elsewhere("best", "124M", True, "x"), rung="fails")
    session.row(lambda: ladder.measure_elsewhere("best", "124M", True, 2), budget=0.5, rung="late")
    notes = [r["note"] for r in session.report.rows]
    assert "argument --micro: x: must be a whole number" in notes[0]
    assert notes[1] == "not measured: took longer than 0.5 s"


def test_a_process_that_is_out_of_memory_is_recognized(monkeypatch):
    program = "import torch; from runtime.command import one_line\nwith one_line('bench.ladder'): "
    program += "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')"
    start = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: start([command[0], "-c", program], **more))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        in_own_process("ladder")


def test_a_rung_that_is_out_of_memory_is_repeated_with_smaller_micro_batches(tmp_path, monkeypatch):
    def measure(name, size, smoke, micro):
        if micro > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(micro_batch=micro)

    monkeypatch.setattr(ladder, "measure", measure)
    session = session_in(tmp_path)
    assert ladder.climb(session, "best", "124M", 10) == dict(micro_batch=2)
    assert [r["note"] for r in session.report.rows] == ["out of memory", "out of memory", ""]
    assert {r["size"] for r in session.report.rows} == {"tiny"}  # a smoke test must not look like a measurement


def test_rungs_are_settings_of_the_trainer():
    """Settings exist in the schema, batches divide, and each rung adds the setting of its name."""
    assert ladder.default_micro("best", "1558M") == ladder.micro_batch("auto") == "auto"
    for size, most in MICRO.items():
        for name, settings in ladder.RUNGS.items():
            for smaller in (most, most // 2, most // 4, 1):
                sequences = ladder.sequences_of(name, size, smaller)
                given = (*settings, f"batch_size={sequences}", f"micro_batch={smaller}")
                run = load_config(ROOT / f"config/{SIZES[size]}.py", [f"--{setting}" for setting in given])
                assert run.per_process(1) == sequences <= 480
                assert sequences % smaller == 0
    graph, cudnn, residual, cast = (
        load_config(ROOT / "config/gpt2_small.py", [f"--{s}" for s in ladder.RUNGS[name]]).compute
        for name in ("loss_in_graph", "cudnn", "bf16_residual", "cast_once")
    )
    assert (graph.attention, graph.residual, graph.cast_weights) == ("flash", "float32", "micro_batch")
    assert cudnn == replace(graph, attention="cudnn")
    assert residual == replace(cudnn, residual="bfloat16")
    assert cast == replace(residual, cast_weights="step")


def gpu_results(folder, size="124M", tokens=612_345.6, date="2026-11-25", hardware="NVIDIA H100"):
    """Result files as bench.ladder and bench.correctness write them on a GPU."""
    facts = dict(bench=f"ladder_{size}_best_nanogpt", hardware=hardware, torch="2.13.0", threads=1, date=date)
    best = dict(rung="best", size=size, tokens_per_s=tokens, mfu=0.5, memory_gb=61.2, optimizer_share=0.006)
    rows = [facts, best | dict(note=""), dict(rung="nanogpt", size=size, tokens_per_s=tokens / 1.2, note="")]
    write = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"ladder_{size}_best_nanogpt_{hardware.replace(' ', '-')}_{date}.jsonl").write_text(write)
    rows = [facts, dict(block="check", what="loss", bound=1e-3, found=1e-5, result="ok", note="")]
    write = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"correctness_124M_{hardware.replace(' ', '-')}_{date}.jsonl").write_text(write)


def test_the_page_of_a_gpu_takes_the_newest_numbers_and_fills_the_readme(tmp_path, monkeypatch):
    gpu_results(tmp_path, tokens=1.0, date="2026-11-24")
    gpu_results(tmp_path)
    gpu_results(tmp_path, size="355M", hardware="cpu-x86_64")
    gpu_results(tmp_path, size="774M", date="2026-11-24")
    newer = tmp_path / "ladder_774M_best_NVIDIA-H100_2026-11-25.jsonl"  # that day nanogpt was not measured
    lines = (tmp_path / "ladder_774M_best_nanogpt_NVIDIA-H100_2026-11-24.jsonl").read_text().splitlines()
    newer.write_text("\n".join(lines[:2]).replace("2026-11-24", "2026-11-25"))
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(gpu_page, "ROOT", tmp_path)
    gpu_page.main(["--folder", str(tmp_path)])
    row = "| 124M | 612,346 | 50.0 % | 61.2 GB | 0.6 % | 1.20x | NVIDIA H100 | 2.13.0 | 2026-11-25 |"
    for text in (readme.read_text(), (tmp_path / "gpu.md").read_text()):
        assert row in text
        assert row.replace("124M", "774M").replace("1.20x", "not measured") in text
        assert "| 355M | not measured |" in text
    assert "| loss | 0.001 | 1e-05 | ok |" in (tmp_path / "gpu.md").read_text()
    assert "--optimizer=mars_m --dtype=bfloat16 --compile=true --attention=cudnn" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.png").stat().st_size > 5000
    assert readme.read_text().endswith((ROOT / "README.md").read_text()[-2000:])


def test_without_a_result_of_a_gpu_there_is_no_page(tmp_path):
    gpu_results(tmp_path, hardware="cpu-x86_64")
    with pytest.raises(SystemExit, match="no result of bench.ladder on a GPU"):
        gpu_page.main(["--folder", str(tmp_path)])
    gpu_page.main(["--folder", str(tmp_path), "--any_hardware", "--keep_readme"])
    assert (tmp_path / "gpu.md").exists()


def test_the_first_hour_on_a_gpu_calls_benches_that_exist(tmp_path):
    """With a stand-in for Python that writes down its arguments; each must be accepted by the bench's own parser."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stand_in.chmod(0o755)
    variables = os.environ | {"PYTHON": str(stand_in), "FOLDER": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts/first_gpu_hour.sh"), "--smoke"]
    done = subprocess.run(command, env=variables, text=True, capture_output=True, timeout=60)
    assert "0 calls failed" in done.stdout, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines() if "bench." in line]
    assert [c[1] for c in calls] == [f"bench.{name}" for name in FIRST_HOUR]
    sizes = [c[c.index("--size") + 1] for c in calls if "--size" in c]
    assert sizes == [*SIZES, "1558M"]
    rungs = {rung for c in calls if "--rungs" in c for rung in c[c.index("--rungs") + 1 : c.index("--smoke")]}
    assert rungs <= ladder.RUNGS.keys()
    assert {c[c.index("--scale") + 1] for c in calls if "--scale" in c} == {"smoke"}


FIRST_HOUR = ["correctness", *["ladder"] * 5, "micro", *["sweep"] * 4, "gpu_page"]
