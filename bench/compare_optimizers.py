"""Does variance reduction help here, and does MARS-M beat Muon? A small GPT under every optimizer.

    python -m bench.compare_optimizers                  every run that is not done yet, then table and plot
    python -m bench.compare_optimizers --report-only

Each member gets four learning rates on one seed, and two more seeds at its best. Runs are ordinary run
folders under runs/compare: an interrupted comparison continues where it stopped. Wall-clock time comes
from a calibration in which all members take turns, since the runs themselves share a noisy machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.report import RESULTS, Report, interleaved
from config.load import load_config
from data.loader import TrainLoader, to_device
from data.shards import open_dataset
from model import GPT
from optimizers import build_optimizer
from runtime.logger import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/compare")
ADAPTIVE, SIGN, ORTHOGONAL = (1e-3, 3e-3, 1e-2, 3e-2), (3e-5, 1e-4, 3e-4, 1e-3), (3e-3, 1e-2, 3e-2, 1e-1)
MEMBERS = {  # name: (arguments, learning rates)
    "AdamW": (["--optimizer=adamw"], ADAPTIVE),
    "Lion": (["--optimizer=lion"], SIGN),
    "Muon": (["--optimizer=muon"], ORTHOGONAL),
    "MARS-AdamW": (["--optimizer=mars"], ADAPTIVE),
    "MARS-Lion": (["--optimizer=mars_lion"], SIGN),
    "MARS-Shampoo": (["--optimizer=mars_shampoo"], ORTHOGONAL),
    "MARS-M": (["--optimizer=mars_m"], ORTHOGONAL),
    "MARS-M unclipped": (["--optimizer=mars_m", "--clip_c=false"], ORTHOGONAL),
    "MARS-M exact": (["--optimizer=mars_m", "--is_approx=false"], ORTHOGONAL),
}
SEEDS = (1, 2, 3)
# the quickstart's corpus and settings with half its layers and batch and two thirds of its width: 54 runs, an hour
SIZE = ["--n_layer=2", "--n_embd=128", "--batch_size=8", "--micro_batch=8"]
VALIDATION = ["--eval_every=50", "--val_windows=512"]


def arguments(member: str, lr: float, seed: int, steps: int) -> list[str]:
    """What makes one run of the comparison; every learning rate ends at a tenth of its peak."""
    words = [*MEMBERS[member][0], f"--optim.lr={lr:g}", f"--schedule.min_lr={lr / 10:g}", f"--seed={seed}"]
    if "mars" in words[0] and "mars_m" not in words[0]:
        words.append(f"--lr_1d={lr / 2:g}")
    name = f"{member.replace(' ', '_')}-lr{lr:g}-seed{seed}-{steps}"
    words += [f"--steps={steps}", f"--checkpoint.every={steps}", *SIZE, *VALIDATION]
    return [*words, f"--name={name}", f"--log.folder={FOLDER}"]


def series(member: str, lr: float, seed: int, steps: int) -> list[tuple[int, float]] | None:
    """(tokens, validation loss) of a finished run, or None."""
    name = next(a for a in arguments(member, lr, seed, steps) if a.startswith("--name=")).partition("=")[2]
    path = FOLDER / name / "metrics.jsonl"
    records = [r for r in read_metrics(path) if "val_loss" in r] if path.exists() else []
    return [(r["tokens"], r["val_loss"]) for r in records] if records and records[-1]["step"] == steps else None


def train(member: str, lr: float, seed: int, steps: int) -> None:
    """One run, unless it is done. A run that ends in nonsense is a result; one that fails is an error."""
    if series(member, lr, seed, steps):
        return
    words = arguments(member, lr, seed, steps)
    command = [sys.executable, str(ROOT / "train_gpt.py"), str(ROOT / "config/quickstart.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{member} lr {lr:g}: {done.stdout}{done.stderr}")
    print(f"{member:18s} lr {lr:<7g} seed {seed}  {series(member, lr, seed, steps)[-1][1]:.4f}", flush=True)


def best_rate(member: str, steps: int) -> float:
    """The learning rate with the lowest final loss on the first seed."""
    return min(MEMBERS[member][1], key=lambda lr: series(member, lr, SEEDS[0], steps)[-1][1])


def step_seconds(rounds: int) -> dict[str, float]:
    """Seconds per step of every member, all taking turns in this process."""
    sides = {}
    for member, (words, rates) in MEMBERS.items():
        run = load_config(ROOT / "config/quickstart.py", [*words, f"--optim.lr={rates[0]}", *SIZE])
        torch.manual_seed(0)
        model = GPT(run.model)
        optimizer = build_optimizer(model, run.optim)
        dataset = open_dataset(run.data.path, run.model.vocab_size)
        sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, batch_size=run.sequences)
        batch = to_device(TrainLoader(dataset, run.data, seed=0, **sizes).batch(0), torch.device("cpu"))

        def step(model: GPT = model, optimizer: torch.optim.Optimizer = optimizer, batch: tuple = batch) -> None:
            if getattr(optimizer, "needs_lookahead", False):
                model(*batch).backward()
                optimizer.update_previous_grad()
                optimizer.zero_grad()
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if getattr(optimizer, "needs_lookahead", False):
                optimizer.update_last_grad()

        sides[member] = step
    return interleaved(sides, rounds)


def report(steps: int, rounds: int) -> None:
    """Table and plot from the finished runs."""
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    seconds = step_seconds(rounds)
    out = Report("compare_optimizers", torch.device("cpu"))
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    finals = {}
    for member in MEMBERS:
        lr = best_rate(member, steps)
        curves = [series(member, lr, seed, steps) for seed in SEEDS]
        last = [c[-1][1] for c in curves]
        finals[member] = last
        tried = {f"{r:g}": round(series(member, r, SEEDS[0], steps)[-1][1], 4) for r in MEMBERS[member][1]}
        mean = [statistics.mean(values) for values in zip(*([v for _, v in c] for c in curves), strict=True)]
        tokens = [t for t, _ in curves[0]]
        per_step = tokens[-1] / steps
        by_tokens.plot([t / 1e6 for t in tokens], mean, label=member)
        by_time.plot([t / per_step * seconds[member] for t in tokens], mean, label=member)
        out.add(
            optimizer=member,
            best_lr=lr,
            val_loss=round(statistics.mean(last), 4),
            spread=round(max(last) - min(last), 4),
            step_time_to_adamw=round(seconds[member] / seconds["AdamW"], 2),
            tried=json.dumps(tried),
        )
    for other in ("MARS-M", "MARS-M unclipped", "MARS-M exact"):
        pairs = [a - b for a, b in zip(finals[other], finals["Muon"], strict=True)]
        out.add(optimizer=f"{other} minus Muon, seed by seed", tried=json.dumps([round(d, 4) for d in pairs]))
    pairs = [a - b for a, b in zip(finals["MARS-AdamW"], finals["AdamW"], strict=True)]
    out.add(optimizer="MARS-AdamW minus AdamW, seed by seed", tried=json.dumps([round(d, 4) for d in pairs]))
    out.table()
    by_tokens.set(xlabel="tokens, millions", ylabel="validation loss, nats per byte", ylim=(None, 3.3))
    by_time.set(xlabel="seconds of training, one thread")
    by_time.legend()
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.25)
    figure.savefig(RESULTS / "compare_optimizers.png", dpi=110)
    print(f"plot: {RESULTS / 'compare_optimizers.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.compare_optimizers")
    parser.add_argument("--steps", type=int, default=500, help="steps of 1024 tokens (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the step time calibration")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args(argv)
    if not args.report_only:
        with ThreadPoolExecutor(args.workers) as pool:
            first = [(m, lr, SEEDS[0], args.steps) for m, (_, rates) in MEMBERS.items() for lr in rates]
            list(pool.map(lambda job: train(*job), first))
            rest = [(m, best_rate(m, args.steps), seed, args.steps) for m in MEMBERS for seed in SEEDS[1:]]
            list(pool.map(lambda job: train(*job), rest))
    report(args.steps, args.rounds)


if __name__ == "__main__":
    main()
