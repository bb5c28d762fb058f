"""Sweeps: the plans can run, every arm gets equal tries, and the report compares seed by seed."""

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT, environment, finish, made_once

from config.load import load_config
from experiments import sweep
from experiments.sweep import Sweep, interval, load_plan, plan_names, rows_of
from runtime.files import locked

SCALES = [(name, scale) for name in plan_names() for scale in load_plan(name).scales]


@pytest.mark.parametrize("name, scale", SCALES)
def test_every_run_of_every_plan_has_a_valid_configuration(name, scale):
    plan = Sweep(name, scale)
    for arm in plan.plan.arms:
        tries = [(run.config.optim.lr, run.config.optim.weight_decay) for run in plan.tuning(arm)]
        assert len(set(tries)) == len(tries)
        rates = sorted({lr for lr, _ in tries})
        assert rates == plan.rates(arm)
        assert all(b / a <= 2.001 for a, b in pairwise(rates))


def test_muon_and_mars_m_at_gamma_0_05_are_both_in_the_plan_of_gamma():
    arms = load_plan("gamma").arms
    assert arms["MARS-M gamma 0.05"].options == "--optimizer=mars_m --clip_c=false --gamma=0.05"
    assert {"Muon", "Muon without Nesterov", "MARS-M gamma 0"} <= arms.keys()


def test_the_interval_of_paired_differences():
    # mean 0.2, standard deviation 0.1, t = 4.303 for two degrees of freedom
    assert interval([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(interval([0.1]))


@pytest.fixture
def plan(dataset, tmp_path, monkeypatch):
    """A plan of two arms with the tiny model; its runs are in the temporary folder."""
    monkeypatch.setattr(Sweep, "root", str(tmp_path / "sweeps"))
    return write_plan(tmp_path, dataset)


def write_plan(folder, dataset):
    path = folder / "small.py"
    path.write_text(
        f"""
from experiments.plan import Arm, Plan, Scale
options = "--data.path={dataset} --schedule.min_lr_ratio=0.1 --schedule.min_lr=none"
scale = Scale("{CONFIG}", options, seeds=(1, 2, 3), multiples=(1.0, 2.0))
plan = Plan("Which is better?", "nothing", dict(AdamW=Arm("--optimizer=adamw", dict(laptop=0.01)),
    Muon=Arm("--optimizer=muon", dict(laptop=0.02), gamma=0.05)), "AdamW", dict(laptop=scale))
"""
    )
    return str(path)


def start_sweep(plan, folder, **options):
    """A process that does the sweep of a plan, with its runs in the temporary folder."""
    script = f"from experiments import sweep; sweep.Sweep.root = {str(folder / 'sweeps')!r}; sweep.main()"
    command = [sys.executable, "-c", script, plan, "--folder", str(folder / "results"), "--workers", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **options)


@pytest.fixture(scope="module")
def swept(dataset, tmp_path_factory):
    """A folder with the finished runs of the plan in `sweeps`, and their report in `results`.

    Two sweeps do them at the same time.
    """

    def make(folder):
        plan = write_plan(folder, dataset)
        for process in [start_sweep(plan, folder, stdout=subprocess.PIPE) for _ in range(2)]:
            finish(process)

    return made_once(tmp_path_factory, "swept", make)


@pytest.fixture
def finished(plan, swept, tmp_path):
    """The plan, whose runs are finished."""
    shutil.copytree(swept / "sweeps", tmp_path / "sweeps")
    return plan


def test_a_sweep_tries_and_reports(finished, swept):
    text = (swept / "results/sweep_small_laptop.md").read_text()
    assert "difference to AdamW" in text
    assert (swept / "results/sweep_small_laptop.png").stat().st_size > 10_000
    rows = {row["arm"]: row for row in json.loads((swept / "results/sweep_small_laptop.json").read_text())["rows"]}
    assert rows.keys() == {"AdamW", "Muon"}
    assert all(len(row["tried"]) == 2 and row["seeds"] == 2 for row in rows.values())
    assert rows["AdamW"]["difference"] == 0
    finals = {arm: [run.loss for run in Sweep(finished, "laptop").reported(arm)] for arm in rows}
    pairs = [b - a for a, b in zip(finals["AdamW"], finals["Muon"], strict=True)]
    assert rows["Muon"]["difference"] == pytest.approx(sum(pairs) / 2)


def test_a_sweep_continues(finished, tmp_path, capsys):
    sweep.main([finished, "--commands"])
    assert capsys.readouterr().out.strip() == ""  # nothing is left to do
    shutil.rmtree(tmp_path / "sweeps/small-laptop/Muon-lr0.02-seed1")
    sweep.main([finished, "--commands"])
    assert [line.split("--name=")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "Muon-lr0.02-seed1"
    ]


def test_the_commands_of_a_sweep_are_those_of_its_unfinished_runs(plan, capsys):
    sweep.main([plan, "--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # two arms at two learning rates; other seeds follow when the best rate is known
    words = lines[0].split()
    assert load_config(CONFIG, words[words.index(str(CONFIG)) + 1 :]).optim.lr == 0.01
    assert rows_of(Sweep(plan, "laptop")) == []


def test_a_run_that_fails_is_named_and_the_others_go_on(plan, tmp_path, capsys, monkeypatch):
    def train(run, devices):
        if run.arm == "Muon":
            raise RuntimeError(f"{run.name}: out of memory")
        folder = tmp_path / "sweeps/small-laptop" / run.name
        folder.mkdir(parents=True)
        record = dict(step=run.config.total_steps, tokens=100, val_loss=run.lr + run.seed)
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(sweep.Run, "train", train)
    with pytest.raises(SystemExit, match="2 runs failed, see above; the same command tries them again"):
        sweep.main([plan, "--folder", str(tmp_path / "results"), "--workers", "2"])
    assert "Muon-lr0.04-seed1: out of memory" in capsys.readouterr().err
    text = (tmp_path / "results/sweep_small_laptop.md").read_text()
    assert "| AdamW | 0.01 (edge of the grid) | 2.5100 |" in text  # the mean of seeds 2 and 3
    assert "Not finished: Muon" in text


@pytest.mark.parametrize(
    "words, problem",
    [
        (["gama"], "gama: no such plan; nearest: 'gamma'"),
        (["zzz"], "zzz: no such plan; nearest: 'benchmark', 'exact'"),
        (["gamma", "--scale=laptp"], "--scale=laptp: gamma has laptop, paper"),
        (["gamma", "--dry_run", "--arms", "Muonn"], "--arms=Muonn: no such arm; nearest: 'Muon"),
    ],
)
def test_an_unknown_name_is_one_line(words, problem):
    with pytest.raises(SystemExit, match=problem):
        sweep.main(words)


def test_a_run_that_diverges_is_a_result(plan, tmp_path):
    """Muon diverges on seed 2; its other runs and those of AdamW end well."""
    for arm in ("AdamW", "Muon"):
        small = Sweep(plan)
        for run in [sweep.Run(small, arm, lr, None, seed) for lr in small.rates(arm) for seed in (1, 2, 3)]:
            run.path.mkdir(parents=True)
            if (arm, run.seed) == ("Muon", 2):
                (run.path / "diverged").touch()
            else:
                record = dict(step=run.config.total_steps, tokens=100, val_loss=run.lr + run.seed)
                (run.path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    sweep.main([plan, "--folder", str(tmp_path / "results")])
    text = (tmp_path / "results/sweep_small_laptop.md").read_text()
    assert "| Muon | 0.02 (edge of the grid) | diverged on 1 of 2 seeds | not known | not known ± not known |" in text
    assert "| AdamW | 0.01 (edge of the grid) | 2.5100 |" in text


def test_runs_of_other_settings_are_not_taken_for_those_of_the_plan(finished, tmp_path):
    Path(finished).write_text(Path(finished).read_text().replace("--optimizer=muon", "--optimizer=muon --momentum=0.9"))
    with pytest.raises(SystemExit, match=r"Muon-lr0.02-seed1: the plan has changed .*momentum: 0.95 -> 0.9\); rename"):
        sweep.main([finished, "--folder", str(tmp_path / "results")])
    assert not Sweep(finished, arms=["AdamW"]).changed_run()  # the runs of the other arm are as they were


def test_runs_on_other_validation_data_are_not_compared(finished, tmp_path):
    """As if the dataset was prepared again between the runs."""
    path = tmp_path / "sweeps/small-laptop/Muon-lr0.02-seed1/metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if "measured_on" in record:
            record["measured_on"]["data"] = "other"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    problem = (
        r"AdamW-lr0.01-seed1 and Muon-lr0.02-seed1 were evaluated on different validation data \(data: \w+ and other\)"
    )
    with pytest.raises(SystemExit, match=f"{problem}; rename the folder of one of the runs"):
        sweep.main([finished, "--folder", str(tmp_path / "results")])
    with pytest.raises(ValueError, match=problem):
        sweep.report(Sweep(finished), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_another_reference_has_its_own_report(finished, tmp_path):
    sweep.main([finished, "--folder", str(tmp_path), "--reference", "Muon"])
    rows = {row["arm"]: row for row in json.loads((tmp_path / "sweep_small_laptop_vs_Muon.json").read_text())["rows"]}
    assert rows["Muon"]["difference"] == 0
    pairs = [a - b for a, b in zip(rows["AdamW"]["losses"], rows["Muon"]["losses"], strict=True)]
    assert rows["AdamW"]["difference"] == pytest.approx(sum(pairs) / 2)
    sweep.main([finished, "--folder", str(tmp_path), "--arms", "AdamW"])
    assert (tmp_path / "sweep_small_laptop_only_AdamW.png").exists()
    assert not (tmp_path / "sweep_small_laptop.md").exists()  # the report of the whole plan is not overwritten


def test_an_arm_with_wrong_settings_stops_the_sweep_before_any_run(plan, tmp_path):
    Path(plan).write_text(Path(plan).read_text().replace("--optimizer=muon", "--optimizer=muonn"))
    with pytest.raises(SystemExit, match='optimizer="muonn": unknown; nearest: muon'):
        sweep.main([plan, "--folder", str(tmp_path)])
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("multiples=(1.0, 2.0)", "multiples=(1.0,)", "scale laptop: tries a single learning rate; give at least two"),
        ("multiples=", "decays=(0.1,), multiples=", "scale laptop: tries a single weight decay; write it into"),
        ("multiples=", "program='visoin', multiples=", "program='visoin': must be 'train_gpt' or 'vision'"),
        ("multiples=", "program='vision', processes=2, multiples=", "processes=2: experiments.vision uses one process"),
        ("seeds=(1, 2, 3)", "seeds=(1, 2, 2)", r"scale laptop: seeds=\(1, 2, 2\): gives a value twice"),
        ("seeds=(1, 2, 3)", "seeds=(1,)", "scale laptop: give at least two seeds"),
        ("AdamW=Arm", "**{'Muon ': Arm('', dict(laptop=1.0)), 'Muon_': Arm('', dict(laptop=1.0))}, AdamW=Arm",
         "arms 'Muon ' and 'Muon_': would use the same run folders"),
        ("seeds=(1, 2, 3)", "seeds=5", "a value has a wrong type"),
        ("dict(laptop=0.01)", "0.01", "a value has a wrong type"),
        ("dict(laptop=0.01)", "dict(paper=0.01)", "arm 'AdamW': has no lr for scale laptop"),
        ('"AdamW", dict(laptop', '"Adam", dict(laptop', "reference='Adam': must be one of the arms, AdamW, Muon"),
        ("plan = Plan", "plans = Plan", "must define `plan`, an experiments.plan.Plan"),
        ("plan = Plan", "plan = Plam", "name 'Plam' is not defined"),
        ("plan = Plan(", "plan = Plan((", "'\\(' was never closed"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_used_is_one_line(plan, old, new, problem):
    Path(plan).write_text(Path(plan).read_text().replace(old, new))
    with pytest.raises(SystemExit, match=problem):
        sweep.main([plan, "--dry_run"])


def test_two_sweeps_of_one_plan_at_once_do_each_run_once(swept):
    runs = [p for p in (swept / "sweeps/small-laptop").iterdir() if not p.name.startswith(".")]
    assert len(runs) == 8
    for run in runs:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if "val_loss" not in r] == list(range(1, 13))
    assert sorted(p.suffix for p in (swept / "results").iterdir()) == [".json", ".md", ".png"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_runs_of_a_killed_sweep_end_with_it(plan, tmp_path):
    Path(plan).write_text(Path(plan).read_text().replace("--data.path", "--steps=1000000 --data.path"))
    process, folder = start_sweep(plan, tmp_path), tmp_path / "sweeps/small-laptop"

    def wait_until(reached):
        end = time.monotonic() + 100
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.1)

    wait_until(lambda: len(list(folder.glob("*/metrics.jsonl"))) == 2)
    process.kill()
    process.wait()

    def all_ended():
        with suppress(BlockingIOError), ExitStack() as locks:
            for run in folder.glob("*/metrics.jsonl"):
                locks.enter_context(locked(folder / f".{run.parent.name}.lock"))
            return True

    wait_until(all_ended)
    for run in folder.glob("*/metrics.jsonl"):  # the trainers have saved their last step
        steps = [json.loads(line)["step"] for line in run.read_text().splitlines()]
        assert (run.parent / f"checkpoints/step_{steps[-1]:07d}/state.json").exists()


@pytest.mark.parametrize(
    "visible, names", [("", {"0", "1"}), ("4,5", {"4", "5"}), ("GPU-aa,GPU-bb", {"GPU-aa", "GPU-bb"})]
)
def test_runs_use_the_gpus_that_the_user_gives(plan, monkeypatch, visible, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used = set()

    def run(command, env, **options):
        used.add(env["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    found = Sweep(plan)
    found.train(workers=2)
    assert used == names
    (error,) = {e.splitlines()[-1] for e in found.failed.values()}  # the runs ended well, and recorded nothing
    assert error == "ended, and metrics.jsonl has no last evaluation"


def test_more_workers_than_gpus_share_them(plan, monkeypatch):
    """The four first runs of the plan start at once, two on each of two GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used, together = [], threading.Barrier(4, timeout=60)

    def run(command, env, **options):
        used.append(env["CUDA_VISIBLE_DEVICES"])
        together.wait()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    found = Sweep(plan)
    found.train(workers=4)
    assert sorted(used) == ["4", "4", "5", "5"]
    assert not any("Barrier" in error for error in found.failed.values())


def test_by_default_every_gpu_has_one_run(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    busy, lock = set(), threading.Lock()

    def run(command, env, **options):
        device = env["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert device not in busy
            busy.add(device)
        time.sleep(0.2)
        with lock:
            busy.remove(device)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    Sweep(plan).train()


def test_the_hours_of_a_gpu_are_estimated(capsys):
    sweep.main(["gamma", "--scale", "paper", "--dry_run"])
    assert re.search(r"\d+ runs, about \d,\d{3} hours of an H100", capsys.readouterr().out)


@pytest.mark.parametrize(
    "output, line",
    [
        (
            "train_gpt: no data\n\nTraceback\nChildFailedError:\n====\n",
            "train_gpt: no data",
        ),
        ("Traceback\nKeyError: 'a'\n=====\n", "KeyError: 'a'"),
    ],
)
def test_the_reason_of_a_failed_run(output, line):
    assert sweep.reason(output) == line


def test_published_losses_belong_to_arms_of_the_paper_scale():
    for name in ("learning_rates", "gamma_schedules"):
        points = sweep.published_points(Sweep(name, "paper"))
        assert points
        assert all(2.8 < p["val_loss"] < 2.9 and "MARS paper" in p["source"] for p in points)
        assert sweep.published_points(Sweep(name, "laptop")) == []


def test_only_some_arms_and_the_reference(plan):
    assert Sweep(plan, "laptop", ["Muon"]).plan.arms.keys() == {"AdamW", "Muon"}
    assert Sweep(plan, "laptop", ["AdamW"]).plan.arms.keys() == {"AdamW"}
