"""Does variance reduction help here, and is MARS-M better than Muon? A small GPT with every optimizer.

    python -m bench.compare_optimizers                  every run that is not finished, then table and plot
    python -m bench.compare_optimizers --report_only

Each optimizer runs with four learning rates on one seed, and with two more seeds at its best learning rate. The runs
are in runs/compare; the same command continues an interrupted comparison. The time per step is measured separately,
with all optimizers taking turns, because the runs themselves share a noisy machine.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.report import RESULTS, ROOT, Report, interleaved
from bench.runs import step_function
from config.load import load_config
from model import GPT
from optimizers import build_optimizer
from runtime.command import Parser
from runtime.logger import METRICS, read_metrics

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
COMPARED = [(other, "Muon") for other in ("MARS-M", "MARS-M unclipped", "MARS-M exact")] + [("MARS-AdamW", "AdamW")]
SEEDS = (1, 2, 3)
# the quickstart with half of its layers and batch and two thirds of its width: 54 runs take an hour
SIZE = ["--n_layer=2", "--n_embd=128", "--batch_size=8", "--micro_batch=8"]
VALIDATION = ["--eval_every=50", "--val_windows=512"]


def run_name(member: str, lr: float, seed: int, steps: int) -> str:
    return f"{member.replace(' ', '_')}-lr{lr:g}-seed{seed}-{steps}"


def series(member: str, lr: float, seed: int, steps: int) -> list[tuple[int, float]] | None:
    """(tokens, validation loss) at every evaluation of a finished run, or None."""
    path = FOLDER / run_name(member, lr, seed, steps) / METRICS
    records = [r for r in read_metrics(path) if "val_loss" in r] if path.exists() else []
    return [(r["tokens"], r["val_loss"]) for r in records] if records and records[-1]["step"] == steps else None


def final_loss(member: str, lr: float, seed: int, steps: int) -> float:
    return series(member, lr, seed, steps)[-1][1]


def train(member: str, lr: float, seed: int, steps: int) -> None:
    """Do one run, unless it is finished. Raises RuntimeError with the output if the run fails."""
    if series(member, lr, seed, steps):
        return
    words = [*MEMBERS[member][0], f"--optim.lr={lr:g}", f"--schedule.min_lr={lr / 10:g}", f"--seed={seed}"]
    if member in ("MARS-AdamW", "MARS-Lion", "MARS-Shampoo"):
        words.append(f"--lr_1d={lr / 2:g}")
    words += [f"--steps={steps}", f"--checkpoint.every={steps}", *SIZE, *VALIDATION]
    words += [f"--name={run_name(member, lr, seed, steps)}", f"--log.folder={FOLDER}"]
    command = [sys.executable, str(ROOT / "train_gpt.py"), str(ROOT / "config/quickstart.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{member} lr {lr:g}: {done.stdout}{done.stderr}")
    print(f"{member:18s} lr {lr:<7g} seed {seed}  {final_loss(member, lr, seed, steps):.4f}", flush=True)


def train_all(steps: int, workers: int) -> None:
    """Do all runs: first every learning rate on one seed, then the best ones on the other seeds."""
    with ThreadPoolExecutor(workers) as pool:
        first = [(m, lr, SEEDS[0], steps) for m, (_, rates) in MEMBERS.items() for lr in rates]
        list(pool.map(lambda job: train(*job), first))
        rest = [(m, best_rate(m, steps), seed, steps) for m in MEMBERS for seed in SEEDS[1:]]
        list(pool.map(lambda job: train(*job), rest))


def best_rate(member: str, steps: int) -> float:
    """The learning rate with the lowest final loss on the first seed."""
    return min(MEMBERS[member][1], key=lambda lr: final_loss(member, lr, SEEDS[0], steps))


def step_seconds(rounds: int) -> dict[str, float]:
    """Seconds per step of every optimizer, all taking turns in this process."""
    sides = {}
    for member, (words, rates) in MEMBERS.items():
        run = load_config(ROOT / "config/quickstart.py", [*words, f"--optim.lr={rates[0]}", *SIZE])
        torch.manual_seed(0)
        model = GPT(run.model)
        tokens = torch.randint(run.model.vocab_size, (run.sequences, run.model.block_size + 1))
        sides[member] = step_function(model, build_optimizer(model, run.optim), tokens[:, :-1], tokens[:, 1:])
    return interleaved(sides, rounds)


def report(steps: int, rounds: int) -> None:
    """Table and plot from the finished runs."""
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    seconds = step_seconds(rounds)
    out = Report("compare_optimizers")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    finals = {}
    for member, (_, rates) in MEMBERS.items():
        lr = best_rate(member, steps)
        curves = [series(member, lr, seed, steps) for seed in SEEDS]
        tokens = [t for t, _ in curves[0]]
        mean = [statistics.mean(loss for _, loss in points) for points in zip(*curves, strict=True)]
        by_tokens.plot([t / 1e6 for t in tokens], mean, label=member)
        by_time.plot([t / tokens[-1] * steps * seconds[member] for t in tokens], mean, label=member)
        last = finals[member] = [curve[-1][1] for curve in curves]
        out.add(
            optimizer=member,
            best_lr=lr,
            val_loss=round(statistics.mean(last), 4),
            spread=round(max(last) - min(last), 4),
            step_time_to_adamw=round(seconds[member] / seconds["AdamW"], 2),
            tried=json.dumps({f"{r:g}": round(final_loss(member, r, SEEDS[0], steps), 4) for r in rates}),
        )
    for one, other in COMPARED:
        differences = [round(a - b, 4) for a, b in zip(finals[one], finals[other], strict=True)]
        out.add(optimizer=f"{one} minus {other}, seed by seed", tried=json.dumps(differences))
    out.table()
    by_tokens.set(xlabel="tokens, millions", ylabel="validation loss, nats per byte", ylim=(None, 3.3))
    by_time.set(xlabel="seconds of training, one thread")
    by_time.legend()
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.25)
    figure.savefig(RESULTS / "compare_optimizers.png", dpi=110)
    print(f"plot: {RESULTS / 'compare_optimizers.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.compare_optimizers", description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="steps of 1024 tokens (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the measurement of step times")
    parser.add_argument("--report_only", action="store_true", help="train nothing; table and plot of finished runs")
    args = parser.parse_args(argv)
    if not args.report_only:
        train_all(args.steps, args.workers)
    report(args.steps, args.rounds)


if __name__ == "__main__":
    main()
