"""Training on a CPU: step time against plain PyTorch, the loop's own overhead, the loader, and the start.

python -m bench.train_step            minutes
python -m bench.train_step --smoke    seconds, a tiny model
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.peers import PlainGPT
from bench.report import ROOT, Report, bench_parser, interleaved, results_folder
from bench.runs import opened, step_function, write_tokens
from data.loader import DataConfig, TrainLoader
from data.shards import open_dataset
from model import GPT, GPTConfig
from optimizers import AdamWConfig, MARSConfig, build_optimizer
from runtime.command import at_least, one_line
from train_gpt import Trainer, train


def bench_step(shape: GPTConfig, batch: int, rounds: int, report: Report) -> None:
    """One training step, forward to update with clipping, ours against plain PyTorch; both with the exact GELU.

    On a CPU the exact GELU takes half the time of the tanh form, so the form must be equal on both sides.
    """
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    plain, ours = PlainGPT(shape), GPT(replace(shape, gelu="exact"))
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    our_step = step_function(ours, build_optimizer(ours, AdamWConfig(lr=1e-3)), idx, targets)

    def plain_step() -> None:
        plain(idx, targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    seconds = interleaved({"plain PyTorch": plain_step, "ours": our_step}, rounds)
    ratio = seconds["plain PyTorch"] / seconds["ours"]
    report.add(what="training step: speed against plain PyTorch", value=ratio, unit="x", wanted=">= 1.0")


def bench_exact(shape: GPTConfig, batch: int, rounds: int, report: Report) -> None:
    """A step of the exact form of MARS, which takes two gradients, against a step of the approximate form."""
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))
    sides = {}
    for name, config in {"approximate": MARSConfig(), "exact": MARSConfig(is_approx=False)}.items():
        model = GPT(shape)
        sides[name] = step_function(model, build_optimizer(model, config), tokens[:, :-1], tokens[:, 1:])
    seconds = interleaved(sides, rounds)
    ratio = seconds["exact"] / seconds["approximate"]
    report.add(what="MARS step: exact against approximate form", value=ratio, unit="x", wanted="<= 2.05")


class SleepingTrainer(Trainer):
    """Sleeps for 200 ms a step instead of computing, evaluating and saving."""

    def accumulate(self, batch: Tensor, step: int) -> Tensor:
        time.sleep(0.2)
        return torch.zeros(())

    def update(self) -> None:
        self.step += 1

    def evaluate_if_due(self, stop: object) -> bool:
        return True

    def save(self) -> None:
        pass


def bench_overhead(steps: int, report: Report) -> None:
    """The time that data, logging and checks add to a step of 200 ms."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder, "tokens"), 257, 500_000)
        settings = [f"--data.path={data}", f"--log.folder={folder}", "--data.val_windows=1"]
        settings += [f"--steps={steps}", "--warmup=0", "--log.every=1", "--device=cpu"]
        with opened([str(ROOT / "config/quickstart.py"), *settings], SleepingTrainer) as trainer:
            start = time.perf_counter()
            train(trainer)
            per_step = (time.perf_counter() - start) / steps
    report.add(what="loop overhead at 200 ms a step", value=100 * (per_step - 0.2) / per_step, unit="%", wanted="<= 2")


def bench_loader(steps: int, report: Report) -> None:
    """The loader alone, from the page cache, with GPT-2's batch of 480 windows of 1024 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(write_tokens(Path(folder, "tokens"), 50257, 60_000_000), 50257)
        loader = TrainLoader(dataset, DataConfig(), block_size=1024, batch_size=480, vocab_size=50257, seed=0)
        loader.batch(0)
        start = time.perf_counter()
        for step in range(steps):
            loader.batch(step)
        rate = steps * 480 * 1024 / (time.perf_counter() - start)
    report.add(what="loader alone", value=rate / 1e6, unit="million tokens/s", wanted=">= 12")


def bench_start(report: Report) -> None:
    """Seconds from the start of the command to the first logged step of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(ROOT / "train_gpt.py"), "config/quickstart.py", "--steps=50"]
        command += ["--log.every=1", f"--log.folder={folder}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        line = next((line for line in process.stdout or () if line.startswith("step ")), None)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    if line is None:
        print("start: not measured, because there is no dataset for the quickstart (python -m data.prepare pydocs)")
        return
    report.add(what="start to first step of the quickstart", value=seconds, unit="s", wanted="< 15")


@one_line("bench.train_step")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("train_step", __doc__)
    parser.add_argument("--rounds", type=at_least(1), default=9)
    args = parser.parse_args(argv)
    report = Report("train_step", results_folder(args))
    shape, batch, rounds = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50304), 16, args.rounds
    if args.smoke:
        shape, batch, rounds = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=512), 4, 2
    bench_step(shape, batch, rounds, report)
    bench_exact(shape, batch, max(2, rounds // 3), report)
    bench_overhead(4 if args.smoke else 40, report)
    bench_loader(2 if args.smoke else 200, report)
    if not args.smoke:
        bench_start(report)
    report.table()


if __name__ == "__main__":
    main()
