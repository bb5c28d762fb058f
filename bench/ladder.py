"""What each setting gains on one GPU. Each rung of the ladder runs the trainer with other settings, or a peer.

python -m bench.ladder                               124M, every rung
python -m bench.ladder --size 1558M --rungs best nanogpt --micro 16 30
python -m bench.ladder --smoke                       a tiny model on the CPU, seconds

The rungs loss_in_graph, cudnn, bf16_residual and cast_once each add one setting to the rung before. The rung best is
cast_once with MARS-M. The rung default is MARS-M with the trainer's own settings. The other rungs change one thing of
cast_once.
The peers are plain PyTorch: nanogpt is written as nanoGPT is. loss_outside compiles the model without its loss.
materialized computes the whole attention matrix and updates with MARS-M tensor by tensor.

Every rung runs in its own process and has its own time limit. Tokens/s, MFU and optimizer_share are those of a step of
480 sequences, computed from the measured times of forward and backward passes and of an update. MFU counts masked
attention, as published figures do.
"""

import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.peers import PlainGPT, plain_loss, published_mars_m
from bench.report import bench_parser
from bench.runs import MICRO, in_own_process, opened, run_arguments
from bench.timing import SIZES, TINY, Session, compiler, elapsed, mark, shape_of
from model import GPT, GPTConfig
from runtime.command import at_least, one_line
from runtime.hardware import memory_gb, peak_flops
from train_gpt import Trainer, train
from training.logger import METRICS, read_metrics

STEP = 480  # sequences per step, for the reported numbers
WHOLE = {"124M": 480, "355M": 480, "774M": 240, "1558M": 120}  # about the sequences per measured step of `best`
BUDGET = {"124M": 150, "355M": 240, "774M": 360, "1558M": 540}  # seconds per rung, with compilation

GRAPH = ("optimizer=adamw", "dtype=bfloat16", "compile=true", "attention=flash")
CUDNN = (*GRAPH, "attention=cudnn")
RESIDUAL = (*CUDNN, "residual=bfloat16")
CAST = (*RESIDUAL, "cast_weights=step")
PEERS = ("nanogpt", "materialized", "loss_outside")
RUNGS: dict[str, tuple[str, ...]] = {  # settings of the trainer; the most important rungs run first
    "best": (*CAST, "optimizer=mars_m"),
    "default": ("optimizer=mars_m",),
    **dict.fromkeys(PEERS, ()),
    "loss_in_graph": GRAPH,
    "cudnn": CUDNN,
    "bf16_residual": RESIDUAL,
    "cast_once": CAST,
    "deterministic": (*CAST, "attention=flash", "deterministic=true"),
    "checkpointing": (*CAST, "activation_checkpointing=true"),
    "max_autotune": CAST,
}
ENVIRONMENT = {
    "max_autotune": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"},
}


class StepTimes:
    """Marks in a training loop: the start of each step, the start of its update, and its end.

    began: when the program began to build the model; compile_s is the time from there to the end of the first step.
    """

    def __init__(self, device: torch.device, began: float) -> None:
        self.device, self.began, self.first = device, began, 0.0
        self.marks: dict[str, list] = {"step": [], "update": [], "end": []}

    def at(self, place: str) -> None:
        """Set a mark at "step", "update" or "end"."""
        self.marks[place].append(mark(self.device))
        if place == "end" and not self.first:  # the first step compiles everything
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.first = time.perf_counter() - self.began

    def numbers(self, c: GPTConfig, sequences: int, warmup: int) -> dict:
        """The numbers of a rung from all steps after `warmup`; sequences: per measured step."""
        starts, updates, ends = (self.marks[place][warmup:] for place in ("step", "update", "end"))
        step = statistics.median(elapsed(a, b) for a, b in pairwise(starts))
        update = statistics.median(elapsed(a, b) for a, b in zip(updates, ends, strict=True))
        whole = (step - update) * STEP / sequences + update
        rate, peak = STEP * c.block_size / whole, peak_flops(self.device)
        with torch.device("meta"):
            model = GPT(c)
        mfu = rate * model.flops_per_token() / peak if peak else None
        times = dict(step_ms=1e3 * step, optimizer_ms=1e3 * update, optimizer_share=update / whole)
        return dict(tokens_per_s=rate, mfu=mfu, memory_gb=memory_gb(self.device), compile_s=self.first - step, **times)


class TimedTrainer(Trainer):
    """The trainer with marks in its steps, without evaluation and checkpoints."""

    times: StepTimes

    def gradients(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self.times.at("step")
        loss = self.accumulate(batch, self.step)
        self.times.at("update")
        return loss, self.clipper.clip(self.step)

    def update(self) -> None:
        super().update()
        self.times.at("end")

    def evaluate_if_due(self, stop: object) -> bool:
        return True

    def save(self) -> None:
        pass


def measure_trainer(
    settings: tuple[str, ...], size: str, smoke: bool, sequences: int, micro: int | str, steps: int
) -> dict:
    """The numbers of the trainer's own loop."""
    batch = (f"batch_size={sequences}", f"micro_batch={micro}", f"steps={steps}", f"log.every={2 if smoke else 10}")
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        opened(run_arguments(Path(folder), size, smoke, *settings, *batch), TimedTrainer) as t,
    ):
        t.times = StepTimes(t.world.device, began)
        train(t)
        sequences = t.run.sequences
        numbers = t.times.numbers(t.run.model, sequences, 1 if smoke else 5)
        wait = statistics.mean(r["data_ms"] for r in read_metrics(t.folder / METRICS)[1:])
    return numbers | dict(data_wait_ms=wait, sequences=sequences, micro_batch=t.micro_batch)


def measure_peer(peer: str, size: str, smoke: bool, sequences: int, micro: int, steps: int) -> dict:
    """The numbers of a plain training loop. Its tokens are on the device from the start."""
    began, device = time.perf_counter(), torch.device("cpu" if smoke else "cuda")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    c = TINY if smoke else shape_of(size)
    with torch.device(device):
        model = PlainGPT(replace(c, vocab_size=c.padded_vocab_size), peer == "materialized")
    forward, parameters = torch.compile(model), list(model.parameters())
    if peer == "materialized":
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        update = published_mars_m(matrices, [p for p in parameters if not any(p is m for m in matrices)])
    else:
        update = torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), fused=True).step
    draw = torch.rand(sequences, c.block_size + 1, device=device)
    tokens = (c.vocab_size**draw - 1).long()  # words as frequent as in the trainer's data, see write_tokens
    times = StepTimes(device, began)
    for _ in range(steps):
        times.at("step")
        for part in tokens.split(micro):
            with torch.autocast(device.type, torch.bfloat16):
                if peer == "loss_outside":
                    loss = plain_loss(forward(part[:, :-1]), part[:, 1:])
                else:
                    loss = forward(part[:, :-1], part[:, 1:])
            (loss * micro / sequences).backward()
        times.at("update")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update()
        model.zero_grad(set_to_none=True)
        times.at("end")
    if peer == "materialized" and counters["inductor"]["fuse_attention"]:
        raise RuntimeError("the compiler replaced the materialized attention by fused attention")
    return times.numbers(c, sequences, 1 if smoke else 5) | dict(sequences=sequences, micro_batch=micro)


def micro_batch(text: str) -> int | str:
    """A number of sequences, or "auto" for the trainer's choice; for argparse."""
    return text if text == "auto" else at_least(1)(text)


def sequences_of(name: str, size: str, micro: Any) -> int:
    """Sequences per measured step: two micro-batches, but for `best` about as many as in training."""
    if micro == "auto":
        return WHOLE[size]
    return max(1, WHOLE[size] // micro) * micro if name == "best" else 2 * micro


def default_micro(name: str, size: str) -> Any:
    """The default micro-batch. It is smaller for materialized attention, whose T x T matrices need much memory."""
    return {"best": "auto", "materialized": max(1, MICRO[size] // 4)}.get(name, MICRO[size])


def measure(name: str, size: str, smoke: bool, micro: Any) -> dict:
    """The numbers of one rung, measured in this process."""
    steps, sequences = 4 if smoke else 26, sequences_of(name, size, micro)
    if name not in PEERS:
        return measure_trainer(RUNGS[name], size, smoke, sequences, micro, steps)
    if smoke:
        sequences, micro = 4, 2
    return measure_peer(name, size, smoke, sequences, micro, steps)


def measure_elsewhere(name: str, size: str, smoke: bool, micro: int | str) -> dict:
    """The numbers of one rung, measured in a new process."""
    words = [f"--size={size}", f"--one={name}", f"--micro={micro}", *(["--smoke"] if smoke else [])]
    return in_own_process("ladder", *words, **ENVIRONMENT.get(name, {}))


def climb(s: Session, name: str, size: str, micro: Any) -> dict:
    """Report a rung and return its numbers. While memory does not suffice, the micro-batch is halved."""
    names: dict[str, Any] = dict(rung=name, size="tiny" if s.smoke else size)
    run = measure if s.smoke else measure_elsewhere
    while True:
        numbers = s.row(partial(run, name, size, s.smoke, micro), BUDGET[size], **names)
        if s.report.rows[-1]["note"] != "out of memory" or micro in (1, "auto"):
            return numbers
        micro //= 2


@one_line("bench.ladder")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("ladder", __doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, help="default: all; for 355M and 774M: best")
    parser.add_argument("--micro", nargs="+", type=micro_batch, help="micro-batches to measure, or auto")
    parser.add_argument("--one", choices=RUNGS, help="measure this rung in this process and print numbers as JSON")
    args = parser.parse_args(argv)
    size = args.size
    if args.one:
        with compiler(args.smoke):
            print(json.dumps(measure(args.one, size, args.smoke, (args.micro or [default_micro(args.one, size)])[0])))
        return
    session = Session("_".join(["ladder", size, *map(str, [*(args.rungs or []), *(args.micro or [])])]), args)
    rungs = args.rungs or (["best"] if size in ("355M", "774M") else list(RUNGS))
    found = {}
    for name in rungs:
        for micro in args.micro or [default_micro(name, size)]:
            found[name] = climb(session, name, size, micro)
    for peer in ("nanogpt", "materialized"):
        if found.get("best") and found.get(peer):
            ratio = found["best"]["tokens_per_s"] / found[peer]["tokens_per_s"]
            session.report.add(rung=f"best against {peer}", size=size, speed_ratio=ratio)
    session.report.table()


if __name__ == "__main__":
    main()
