"""Every bench runs in its smoke mode, measures both sides, and leaves a table."""

import contextlib
import importlib.util
import json
import math
import re
import runpy
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch._dynamo.utils import counters

from bench import correctness, cpu, facts, gpu, page, parts
from bench.correctness import by_kernel, idle_fraction
from bench.prediction import MEMORY, PER_WIDTH, predicted
from bench.report import Report
from bench.runs import MICRO, in_own_process
from bench.timing import SIZES, TINY, Session, TimeIsUp, shape_of, time_limit
from config.load import load_config
from model import GPT


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


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The rows of bench.cpu by group and side, of all groups whose packages are there."""
    parquet = importlib.util.find_spec("pyarrow") and Path("/proc/self/status").exists()
    groups = [*cpu.GROUPS, "memory"] if parquet else [g for g in cpu.GROUPS if g != "tokenization"]
    measured = smoke_rows(cpu, tmp_path_factory.mktemp("cpu"), *groups)
    return {(r["group"], r["side"]): r for r in measured}


def test_the_sides_of_a_group_on_a_cpu_are_compared_with_its_first_one(on_cpu):
    firsts = {}
    for (group, _), row in on_cpu.items():
        if "seconds" in row:
            first = firsts.setdefault(group, row)
            assert row["ratio"] == row["seconds"] / first["seconds"]
    assert firsts.keys() >= cpu.GROUPS.keys() - {"tokenization"}
    assert {side for group, side in on_cpu if group == "matrices"} > {"Muon + AdamW (torch)", "Muon", "MARS-M"}


def test_rates_on_a_cpu_are_amounts_divided_by_times(on_cpu):
    eight = on_cpu["generation", "cache, 8 prompts in a batch"]
    assert eight["tokens_per_s"] * eight["seconds"] == pytest.approx(8 * 16)
    loader = on_cpu["loader", "loader"]
    assert loader["tokens_per_s"] * loader["seconds"] == pytest.approx(2 * 480 * 1024)
    if alone := on_cpu.get(("tokenization", "the tokenizer alone, 1 process")):
        assert alone["MB_per_s"] * alone["seconds"] == pytest.approx(0.2)


def test_memory_of_a_preparation_is_that_of_a_process_with_numpy(on_cpu):
    found = [r for (group, _), r in on_cpu.items() if group == "memory"]
    assert all(0.02 < r[key] < 1 for r in found for key in ("parent_GB", "worker_GB"))


def test_an_unknown_group_or_part_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bench.cpu: optimizer: unknown; the groups are optimizers, matrices"):
        cpu.main(["optimizer", f"--folder={tmp_path}"])
    with pytest.raises(SystemExit, match="bench.parts: ce: unknown; the parts are loss, attention"):
        parts.main(["ce", f"--folder={tmp_path}"])


def test_parts(tmp_path):
    found = {(r["part"], r["what"]): r for r in smoke_rows(parts, tmp_path)}
    assert {part: sum(p == part for p, _ in found) for part in parts.PARTS} == {
        **{"loss": 5, "attention": 3, "newton_schulz": 2, "optimizers": 6}
    }
    missing = {what for (_, what), row in found.items() if row["note"]}
    on_gpu = {what for _, what in found if "fused_loss" in what}  # and a CPU has only flash attention
    assert on_gpu <= missing <= {*on_gpu, "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"}
    products, compiled, eager, *fused = (r for (part, _), r in found.items() if part == "loss")
    assert all("needs a GPU" in r["note"] for r in fused)
    assert "loss" not in products
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5) == pytest.approx(math.log(512), rel=0.05)
    assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-2)


def test_floor_of_an_optimizer_step(tmp_path):
    """AdamW reads weights, gradients and two moments, and writes all but the gradients: 28 bytes a parameter."""
    found = {r["what"]: r for r in smoke_rows(parts, tmp_path, "optimizers")}
    with torch.device("meta"):
        count = GPT(TINY).num_params()
    floor = 1e3 * 28 * count / (1e12 * found["copy"]["copy_tb_s"])
    assert found["AdamW fused (torch)"]["floor_ms"] == pytest.approx(floor)


def test_floating_point_operations_of_newton_schulz():
    """20 m^2 n + 10 m^3 over every matrix of a layer: qkv, proj, and both of the MLP."""
    for size, teraflop in (("124M", 1.52), ("1558M", 55.05)):
        d = shape_of(size).n_embd
        by_hand = shape_of(size).n_layer * sum(20 * d * d * n * d + 10 * d**3 for n in (3, 1, 4, 4))
        flops = parts.newton_schulz_flops(shape_of(size))
        assert flops == by_hand == pytest.approx(1e12 * teraflop, rel=1e-2)


def test_a_measurement_that_fails_leaves_a_note_and_the_bench_goes_on(tmp_path):
    session = session_in(tmp_path)

    def fail(error):
        raise error

    session.row(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), what="a")
    session.row(lambda: fail(RuntimeError("no such kernel\nat x")), what="b")
    session.row(lambda: time.sleep(5), what="c", budget=0.01)
    assert session.row(lambda: dict(ms=1.0), what="d") == dict(what="d", ms=1.0, note="")
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


def test_a_measurement_that_is_cut_off_leaves_what_it_has_told(tmp_path):
    session = session_in(tmp_path)
    program = "import json, time; print(json.dumps(dict(ms=1)), flush=True); time.sleep(60)"
    written = []

    def tell(**numbers):
        session.report.update(**numbers)
        written.append(json.loads(session.report.path.read_text().splitlines()[-1]))

    def measure():
        in_own_process([sys.executable, "-c", program], tell)

    row = session.row(measure, budget=3, side="best")
    assert row == dict(side="best", ms=1, note="stopped: took longer than 3 s")
    assert written == [dict(side="best", ms=1)]  # it is in the file before the side ends


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
    with pytest.raises(SystemExit, match=r"bench\.parts: needs a CUDA GPU; --smoke"):
        parts.main(["loss", f"--folder={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_correctness(tmp_path):
    """Without Inductor: a smoke test may not compile for minutes."""
    inductor = counters["inductor"].total()
    checks = {r["what"]: r for r in smoke_rows(correctness, tmp_path)}
    assert counters["inductor"].total() == inductor
    assert len(checks) == 15
    on_a_gpu = {what for what, r in checks.items() if r["result"] == "not measured"}
    assert {what.split(" against")[0].split()[-1] for what in on_a_gpu if "against" in what} == {"attention"}
    assert {what.split()[0] for what in on_a_gpu if "against" not in what} == {"waits", "fraction", "copies"}
    cudnn = checks["bf16 eager, cuDNN attention against float32 eager: loss, relative"]
    assert cudnn["found"] == "attention runs in flash here"
    for what in checks.keys() - on_a_gpu:
        assert (checks[what]["result"], checks[what]["note"]) == ("ok", "")
        assert 0 <= checks[what]["found"] <= checks[what]["bound"]
    assert checks["bf16 compiled against float32 eager: gradient of the worst tensor, relative"]["found"] > 1e-4


@pytest.mark.parametrize("part", correctness.CHECKS)
def test_only_a_part_of_the_checks(tmp_path, monkeypatch, part):
    done = []
    for name in correctness.CHECKS:
        monkeypatch.setattr(correctness, f"check_{name}", lambda session, *rest, name=name: done.append(name))
    correctness.main(["--smoke", f"--folder={tmp_path}", "--only", part])
    assert done == [part]


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
    on_gpu = [e for e in events if e.get("cat") in correctness.ON_GPU]
    assert len(on_gpu) == 4
    assert idle_fraction(on_gpu) == pytest.approx(1 - (50 + 30.2 + 0.5) / 100)
    assert by_kernel(on_gpu) == pytest.approx({"gemm": 80 / 90.7, "Memcpy DtoH": 10.2 / 90.7})


def test_facts(tmp_path):
    found = {r["what"]: r for r in smoke_rows(facts, tmp_path)}
    assert found["card"]["torch"] == torch.__version__
    assert found["copy"]["tb_s"] > 0
    assert found["product of 8192 x 8192 in bf16"]["of_peak"] is None  # unknown for a CPU
    assert found["attention kernel by setting"] == dict(
        what="attention kernel by setting", auto="flash", flash="flash", cudnn="flash", note=""
    )


def test_every_side_of_training(tmp_path):
    with pytest.raises(SystemExit) as stop:  # because a side fails
        smoke_rows(gpu, tmp_path, "--sides", *gpu.SIDES)
    assert stop.value.code == 1
    found = {r["side"]: r for r in rows(tmp_path)}
    assert found.keys() == {*gpu.SIDES, "best against nanogpt", "best against published"}
    assert "needs a GPU" in found.pop("best_fused_loss")["note"]
    best = found["best"]["tokens_per_s"]
    for peer in gpu.PLAIN:
        assert found.pop(f"best against {peer}")["speed_ratio"] == best / found[peer]["tokens_per_s"]
    for name, r in found.items():
        numbers = ("tokens_per_s", "memory_gb", "step_ms", "optimizer_ms", "optimizer_share", "start_s")
        assert all(0 < r[key] < math.inf for key in numbers), name
        assert r["optimizer_ms"] < r["step_ms"]
        assert (r["note"], r["size"], r["steps"]) == ("", "tiny", 3)
        assert r["mfu"] is None  # unknown for a CPU
        assert ("data_wait_ms" in r) == ("estimate_gb" in r) == (name not in gpu.PLAIN)
        # tokens/s of a step of 480 sequences, computed from a step of `sequences`
        whole = (r["step_ms"] - r["optimizer_ms"]) * 480 / r["sequences"] + r["optimizer_ms"]
        assert r["tokens_per_s"] == pytest.approx(1e3 * 480 * 64 / whole)
        assert r["optimizer_share"] == pytest.approx(r["optimizer_ms"] / whole)


def test_a_side_runs_in_its_own_process_and_tells_its_numbers_early(tmp_path):
    session = session_in(tmp_path)
    told = []
    command = [sys.executable, "-m", "bench.gpu", "--one=nanogpt", "--micro=1", "--smoke"]
    in_own_process(command, lambda **numbers: told.append(numbers))
    assert [*map(sorted, told[:2])] == [["micro_batch"], ["start_s"]]
    assert told[-1]["tokens_per_s"] > 0
    row = session.row(partial(gpu.measure_elsewhere, session, "best", "124M", "x", 4), side="fails")
    assert "argument --micro: x: must be a whole number" in row["note"]


def test_a_process_that_is_out_of_memory_is_recognized():
    program = "import torch; from runtime.command import one_line\nwith one_line('bench.gpu'): "
    program += "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')"
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        in_own_process([sys.executable, "-c", program], print)


def test_a_side_that_is_out_of_memory_is_repeated_with_smaller_micro_batches(tmp_path, monkeypatch):
    def measure(name, size, smoke, micro, steps, tell):
        if micro > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict(micro_batch=micro)

    monkeypatch.setattr(gpu, "measure", measure)
    session = session_in(tmp_path)
    assert gpu.report_side(session, "best", "124M", 10, 4)["micro_batch"] == 2
    assert [r["note"] for r in session.report.rows] == ["out of memory", "out of memory", ""]
    assert {r["size"] for r in session.report.rows} == {"tiny"}  # a smoke test must not look like a measurement


def test_micro_batches_that_a_side_cannot_have_are_refused(tmp_path):
    assert gpu.micro_batches("best", "124M", None) == [40]
    assert gpu.micro_batches("published", "124M", None) == [10]
    for words, problem in (
        (["best_autotuned", "--micro", "60"], "--micro 60: best_autotuned allows at most 40 sequences"),
        (["nanogpt", "--micro", "auto"], "--micro auto: only the trainer can choose it"),
    ):
        with pytest.raises(SystemExit, match=problem):
            gpu.main(["--smoke", f"--folder={tmp_path}", "--sides", *words])


def test_no_default_micro_batch_has_2_to_the_31_logits():
    assert all(MICRO[size] * 1024 * shape_of(size).padded_vocab_size < 2**31 for size in SIZES)


def test_sides_are_settings_of_the_trainer():
    """Settings exist in the schema, and each side of the trainer differs from best in the setting of its name."""
    runs = {
        name: load_config(ROOT / "config/gpt2_small.py", [f"--{setting}" for setting in settings])
        for name, settings in gpu.SIDES.items()
    }
    best = runs["best"].compute
    assert (best.attention, best.residual, best.cast_weights) == ("cudnn", "bfloat16", "step")
    assert runs["best_flash"].compute == replace(best, attention="flash")
    assert runs["best_float32_residual"].compute == replace(best, residual="float32")
    assert runs["best_cast_micro_batch"].compute == replace(best, cast_weights="micro_batch")
    assert runs["best_deterministic"].compute == replace(best, attention="flash", deterministic=True)
    assert runs["best_checkpointing"].compute == replace(best, activation_checkpointing=True)
    assert runs["default"].compute == runs["adamw"].compute == runs["eager"].compute == type(best)()
    assert [runs[name].optimizer for name in ("best", "default", "eager", "adamw")] == [*["mars_m"] * 3, "adamw"]


@pytest.mark.parametrize("card", MEMORY)
def test_a_prediction_is_work_divided_by_rates(card):
    """124M: 6 FLOPs a weight, 7 T C a layer, and the bytes of the other kernels; H200: the numbers by hand."""
    best, default = (predicted("124M", side, card) for side in ("best", "default"))
    assert best["tokens_per_s"] > default["tokens_per_s"]
    products = 6 * (12 * 12 * 768**2 + 50304 * 768) / 620e12
    attention = 7 * 1024 * 768 * 12 / 280e12
    moved = 84 * 768 * 12 + 6 * 50304 + 12 * 123.6e6 / 40960
    seconds = (products + attention + moved / MEMORY[card]) / 0.97
    assert 1 / best["tokens_per_s"] == pytest.approx(seconds, rel=0.01)  # the optimizer's step takes less than 1 %
    assert 0 < best["optimizer_share"] < 0.01


def test_the_predictions_of_the_docs_are_the_computed_ones():
    table = (ROOT / "docs/performance.md").read_text().split(page.BEGIN)[1].split(page.END)[0]
    rows = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    expected = [line.split(" | ") for line in page.prediction_table({}).splitlines()[2:]]
    assert [(*r[:3], r[4]) for r in rows] == [(*r[:3], r[4]) for r in expected]
    assert len(rows) == len(PER_WIDTH) * len(SIZES)


def gpu_results(folder, size="124M", tokens=612_345.6, date="2026-11-25", hardware="NVIDIA H100 80GB HBM3"):
    """Result files as bench.gpu and bench.correctness write them on a GPU."""
    facts = dict(bench=f"gpu_{size}_best_nanogpt", hardware=hardware, torch="2.13.0", threads=1, date=date)
    best = dict(side="best", size=size, tokens_per_s=tokens, mfu=0.5, memory_gb=61.2, optimizer_share=0.006)
    best |= dict(attention="cudnn", micro_batch=40, note="")
    nanogpt = best | dict(side="nanogpt", tokens_per_s=tokens / 1.2)
    rows = [facts, best, nanogpt, dict(side="published", size=size, note="out of memory")]
    write = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"gpu_{size}_best_nanogpt_{hardware.replace(' ', '-')}_{date}.jsonl").write_text(write)
    rows = [facts, dict(block="check", what="loss", bound=1e-3, found=1e-5, result="ok", note="")]
    write = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"correctness_124M_{hardware.replace(' ', '-')}_{date}.jsonl").write_text(write)


def test_the_page_takes_the_newest_numbers_and_fills_the_docs(tmp_path, monkeypatch):
    gpu_results(tmp_path, tokens=1.0, date="2026-11-24")
    gpu_results(tmp_path)
    gpu_results(tmp_path, size="355M", hardware="cpu-x86_64")
    gpu_results(tmp_path, size="355M", hardware="null GPU")
    gpu_results(tmp_path, size="774M", date="2026-11-24")
    newer = tmp_path / "gpu_774M_best_NVIDIA-H100-80GB-HBM3_2026-11-25.jsonl"  # that day nanogpt was not measured
    lines = (tmp_path / "gpu_774M_best_nanogpt_NVIDIA-H100-80GB-HBM3_2026-11-24.jsonl").read_text().splitlines()
    newer.write_text("\n".join(lines[:2]).replace("2026-11-24", "2026-11-25"))
    metrics = tmp_path / "runs/first/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 60, "loss": 2.5, "tokens_per_s": 7.0}\n{"step": 60, "val_loss": 2.25}\n')
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main(["--folder", str(tmp_path)])
    readme, text = (tmp_path / "README.md").read_text(), (tmp_path / "gpu.md").read_text()
    card = "NVIDIA H100 80GB HBM3 | 2.13.0 | 2026-11-25 |"
    row = f"| 124M | 612,346 | 50.0 % | cudnn | 40 | 61.2 GB | 0.6 % | 1.20x | {card}"
    for written in (readme, text):
        assert row in written
        assert row.replace("124M", "774M").replace("1.20x", "not measured") in written
        assert "| 355M | not measured |" in written
    assert "| loss | 0.001 | 1e-05 | ok |" in text
    assert "| first | 60 | 2.5 | 2.25 | 7 |" in text
    assert "--attention=cudnn" in text
    assert re.search(r"\| 124M \| published \|[ |]*\| out of memory \|", text)
    assert readme.endswith((ROOT / "README.md").read_text()[-2000:])
    measured = (tmp_path / "docs/performance.md").read_text()
    assert re.search(r"\| best \| 124M \| [^|]+ \| not measured \| [^|]+ \| 612.3 \(50.0 %\) \|", measured)
    assert re.search(r"\| best \| 355M \| [^|]+ \| not measured \| [^|]+ \| not measured \|", measured)


def test_where_the_side_best_fails_the_page_has_its_error_and_its_speed_with_flash_attention(tmp_path):
    gpu_results(tmp_path)
    (path,) = tmp_path.glob("gpu_*.jsonl")
    facts, best, nanogpt = map(json.loads, path.read_text().splitlines()[:3])
    failed = dict(side="best", size="124M", note="not measured: cuDNN error")
    rows = [facts, failed, best | dict(side="best_flash", attention="flash"), nanogpt]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.main(["--folder", str(tmp_path), "--keep_docs"])
    text = (tmp_path / "gpu.md").read_text()
    assert "| 124M | 612,346 | 50.0 % | flash | 40 | 61.2 GB | 0.6 % | 1.20x |" in text
    assert re.search(r"\| 124M \| best \|[ |]*\| not measured: cuDNN error \|", text)


def test_without_a_result_of_a_gpu_there_is_no_page(tmp_path):
    gpu_results(tmp_path, hardware="cpu-x86_64")
    with pytest.raises(SystemExit, match="no result of bench.gpu on a GPU"):
        page.main(["--folder", str(tmp_path)])
    page.main(["--folder", str(tmp_path), "--any_hardware", "--keep_docs"])
    assert (tmp_path / "gpu.md").exists()


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "bench").glob("*.py") if "Moved:" in p.read_text()])
def test_a_command_that_moved_says_where(name):
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    new = re.fullmatch(rf"bench.{name} is now (\S+): python -m \1.*", str(stop.value))[1]
    assert importlib.util.find_spec(new)
