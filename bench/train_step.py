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
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from bench.report import Report, interleaved
from config.load import apply, load_config
from data.loader import DataConfig, TrainLoader
from data.shards import open_dataset, write_shard
from model import GPT, GPTConfig
from optimizers import AdamWConfig, MARSConfig, build_optimizer
from runtime.distributed import World
from runtime.guard import Guard

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """A GPT of the same shape as anybody would write it in plain PyTorch, with loss and tied head."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def bench_step(shape: GPTConfig, batch: int, rounds: int, report: Report) -> None:
    """One training step, forward to update with clipping, ours against plain PyTorch."""
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    plain, ours = PlainGPT(shape), GPT(shape)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    optimizer = build_optimizer(ours, AdamWConfig(lr=1e-3))
    guard = Guard(ours, optimizer, 1.0)

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
        guard = Guard(model, optimizer, 1.0)

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
        tokens = np.random.default_rng(0).integers(0, 257, 500_000).astype(np.uint16)
        for name in ("train_000000.bin", "val_000000.bin"):
            write_shard(Path(folder, name), tokens, len(tokens))
        run = load_config(ROOT / "config/quickstart.py", [f"--steps={steps}", "--warmup=0", "--log.every=1"])
        run = apply(run, {"data.path": folder, "log.folder": folder, "data.val_windows": 1})
        trainer = train_gpt.Trainer(run, World(0, 1, CPU), fresh=False)

        def sleep(self: train_gpt.Trainer, batch: Tensor, step: int) -> Tensor:
            time.sleep(0.2)
            return torch.zeros(())

        with (
            mock.patch.object(train_gpt.Trainer, "accumulate", sleep),
            mock.patch.object(train_gpt.Trainer, "update"),
            mock.patch.object(train_gpt.Trainer, "evaluate"),
            mock.patch.object(train_gpt.Trainer, "save", return_value=None),
        ):
            start = time.perf_counter()
            train_gpt.train(trainer)
            per_step = (time.perf_counter() - start) / steps
    report.add(what="loop overhead at 200 ms a step", value=100 * (per_step - 0.2) / per_step, unit="%", wanted="<= 2")


def bench_loader(steps: int, report: Report) -> None:
    """The loader alone, from page cache, GPT-2's batch of 480 windows of 1024 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 50257, 60_000_000).astype(np.uint16)
        for name in ("train_000000.bin", "val_000000.bin"):
            write_shard(Path(folder, name), tokens, len(tokens))
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
