"""The main job on a CPU: step time against plain PyTorch, the loop's own overhead, the loader, the start.

python -m bench.train_step            minutes
python -m bench.train_step --smoke    seconds, a tiny model
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

import train_gpt
from bench.peers import PlainGPT
from bench.report import Report, interleaved
from bench.timing import ROOT, write_tokens
from config.load import apply, load_config
from data.loader import DataConfig, TrainLoader
from data.shards import open_dataset
from model import GPT, GPTConfig
from optimizers import AdamWConfig, MARSConfig, build_optimizer
from runtime.clipping import GradientClipper
from runtime.compute import collector_paused
from runtime.distributed import ALONE

CPU = torch.device("cpu")


def bench_step(shape: GPTConfig, batch: int, rounds: int, report: Report) -> None:
    """One training step, forward to update with clipping, ours against plain PyTorch."""
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    plain, ours = PlainGPT(shape), GPT(shape)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    optimizer = build_optimizer(ours, AdamWConfig(lr=1e-3))
    guard = GradientClipper(ours, optimizer, 1.0)

    def plain_step() -> None:
        plain(idx, targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def our_step() -> None:
        ours(idx, targets).backward()
        guard.clip(0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = interleaved({"plain PyTorch": plain_step, "ours": our_step}, rounds)
    ratio = seconds["plain PyTorch"] / seconds["ours"]
    report.add(what="training step: speed against plain PyTorch", value=ratio, unit="x", wanted=">= 1.0")


def bench_exact(shape: GPTConfig, batch: int, rounds: int, report: Report) -> None:
    """A step of the exact form, which takes a second gradient, against one of the approximate form."""
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))

    def step_of(config: MARSConfig) -> Callable[[], None]:
        model = GPT(shape)
        optimizer = build_optimizer(model, config)
        guard = GradientClipper(model, optimizer, 1.0)

        def gradient() -> None:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            guard.clip(0)

        def step() -> None:
            if optimizer.needs_lookahead:
                gradient()
                optimizer.update_previous_grad()
                optimizer.zero_grad(set_to_none=True)
            gradient()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            optimizer.update_last_grad()

        return step

    sides = {"approximate": step_of(MARSConfig()), "exact": step_of(MARSConfig(is_approx=False))}
    seconds = interleaved(sides, rounds)
    ratio = seconds["exact"] / seconds["approximate"]
    report.add(what="MARS step: exact against approximate form", value=ratio, unit="x", wanted="<= 2.05")


def bench_overhead(steps: int, report: Report) -> None:
    """The loop with its computation replaced by 200 ms of sleep: what data, logging and checks add."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder, 257, 500_000)
        run = load_config(ROOT / "config/quickstart.py", [f"--steps={steps}", "--warmup=0", "--log.every=1"])
        run = apply(run, {"data.path": folder, "log.folder": folder, "data.val_windows": 1})
        trainer = train_gpt.Trainer(run, ALONE, fresh=False)

        def sleep(self: train_gpt.Trainer, batch: Tensor, step: int) -> Tensor:
            time.sleep(0.2)
            return torch.zeros(())

        def take_no_step(self: train_gpt.Trainer) -> None:
            self.step += 1
            self.saved_step = self.step

        with (
            mock.patch.object(train_gpt.Trainer, "accumulate", sleep),
            mock.patch.object(train_gpt.Trainer, "update", take_no_step),
            mock.patch.object(train_gpt.Trainer, "evaluate", return_value=None),
            mock.patch.object(train_gpt.Trainer, "save", return_value=None),
            collector_paused(),
        ):
            start = time.perf_counter()
            train_gpt.train(trainer)
            per_step = (time.perf_counter() - start) / steps
    report.add(what="loop overhead at 200 ms a step", value=100 * (per_step - 0.2) / per_step, unit="%", wanted="<= 2")


def bench_loader(steps: int, report: Report) -> None:
    """The loader alone, from page cache, GPT-2's batch of 480 windows of 1024 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder, 50257, 60_000_000)
        dataset = open_dataset(folder, 50257)
        loader = TrainLoader(dataset, DataConfig(), block_size=1024, batch_size=480, vocab_size=50257, seed=0)
        loader.batch(0)
        start = time.perf_counter()
        for step in range(steps):
            loader.batch(step)
        rate = steps * 480 * 1024 / (time.perf_counter() - start)
    report.add(what="loader alone", value=rate / 1e6, unit="million tokens/s", wanted=">= 12")


def bench_start(report: Report) -> None:
    """Seconds from the shell's return key to the first logged step of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(ROOT / "train_gpt.py"), "config/quickstart.py", "--steps=50"]
        command += ["--log.every=1", f"--log.folder={folder}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        line = next((line for line in process.stdout if line.startswith("step ")), None)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    if line is None:
        print("start: not measured, the quickstart's dataset is not there (python -m data.prepare pydocs)")
        return
    report.add(what="start to first step of the quickstart", value=seconds, unit="s", wanted="< 15")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.train_step")
    parser.add_argument("--smoke", action="store_true", help="tiny model, seconds")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    report = Report("train_step_smoke" if args.smoke else "train_step", CPU)
    shape = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50304)
    if args.smoke:
        shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=512)
    bench_step(shape, 4 if args.smoke else 16, 2 if args.smoke else args.rounds, report)
    bench_exact(shape, 4 if args.smoke else 16, 2 if args.smoke else max(2, args.rounds // 3), report)
    bench_overhead(4 if args.smoke else 40, report)
    bench_loader(2 if args.smoke else 200, report)
    if not args.smoke:
        bench_start(report)
    report.table()


if __name__ == "__main__":
    main()
