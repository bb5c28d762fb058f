"""Training speed on one GPU: tokens/s, MFU and memory of several sides.

python -m bench.gpu                                       124M: best, default, nanogpt and published
python -m bench.gpu --size 1558M --sides best --micro 16 30
python -m bench.gpu --sides default adamw eager --steps 3   memory against its estimate, in a short time
python -m bench.gpu --smoke                               a tiny model on the CPU, seconds

The side default is the trainer with MARS-M and no other setting. The side best has the fastest settings. Every other
side of the trainer differs from one of these two in the setting that its name says.
Two sides are plain PyTorch: nanogpt is written as nanoGPT is. published is written as the code of the MARS papers is:
it computes the whole attention matrix and updates with MARS-M tensor by tensor.

Every side runs in a process of its own and has a time limit. A row is written while its side runs, so a side that is
cut off leaves the numbers of the steps so far. The exit status is 1 if a side has no speed. A measured step has four
micro-batches. Tokens/s, MFU and optimizer_share are those of a step of 480 sequences, computed from the measured times
of forward and backward passes and of an update. MFU counts masked attention, as published figures do. start_s is the
time to the end of the first step, most of it compilation. memory_gb is the allocator's peak after the first steps, and
estimate_gb is what --preflight and --micro_batch=auto compute without training.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.peers import PlainGPT, mars_m_by_tensor
from bench.report import bench_parser
from bench.runs import MICRO, attention_of, in_own_process, opened, run_arguments
from bench.timing import SIZES, TINY, Session, compiler, elapsed, mark, shape_of
from model import GPT, GPTConfig
from runtime.command import at_least, one_line
from runtime.errors import UserError
from runtime.hardware import memory_gb, peak_flops
from train_gpt import Trainer, train
from training.logger import METRICS, read_metrics
from training.preflight import memory_estimate

STEP = 480  # sequences per step, for the reported numbers
BUDGET = {"124M": 150, "355M": 240, "774M": 360, "1558M": 540}  # seconds per side, with compilation
MOST_AUTOTUNED = 40  # sequences of 1024: torch 2.11 autotunes larger products into wrong ones

ON_GPU = ("dtype=bfloat16", "compile=true")  # what "auto" means on a GPU
BEST = (*ON_GPU, "optimizer=mars_m", "attention=cudnn", "residual=bfloat16", "cast_weights=step")
PLAIN = ("nanogpt", "published")
SIDES: dict[str, tuple[str, ...]] = {  # settings of the trainer
    "best": BEST,
    "default": ("optimizer=mars_m",),
    **dict.fromkeys(PLAIN, ()),
    "adamw": ("optimizer=adamw",),
    "eager": ("optimizer=mars_m", "compile=false"),
    "best_flash": (*BEST, "attention=flash"),
    "best_fused_loss": (*BEST, "fused_loss=true"),
    "best_float32_residual": (*BEST, "residual=float32"),
    "best_cast_micro_batch": (*BEST, "cast_weights=micro_batch"),
    "best_deterministic": (*BEST, "attention=flash", "deterministic=true"),
    "best_checkpointing": (*BEST, "activation_checkpointing=true"),
    "best_autotuned": BEST,
}
ENVIRONMENT = {
    "best_autotuned": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"},
}
Tell = Callable[..., object]  # takes the numbers so far as keyword arguments


class StepTimes:
    """Marks in a training loop of a model: the start of each step, the start of its update, and its end.

    steps: of the loop, of `sequences` sequences each; the first ones are not measured.
    """

    def __init__(self, c: GPTConfig, device: torch.device, steps: int, sequences: int, tell: Tell) -> None:
        self.began, self.device, self.tell = time.perf_counter(), device, tell
        self.context, self.sequences = c.block_size, sequences
        self.unmeasured = max(1, min(5, steps // 4))
        self.marks: dict[str, list] = {"step": [], "update": [], "end": []}
        with torch.device("meta"):
            self.flops = GPT(c).flops_per_token()

    def at(self, place: str) -> None:
        """Set a mark at "step", "update" or "end"."""
        self.marks[place].append(mark(self.device))
        if place != "end":
            return
        done = len(self.marks["end"])
        if done == 1:  # this step has compiled everything
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.tell(start_s=time.perf_counter() - self.began)
        if done == self.unmeasured and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if done > self.unmeasured + 1 and done % 5 == 0:
            self.tell(**self.numbers())

    def numbers(self) -> dict:
        """The numbers of the measured steps so far."""
        starts, updates, ends = (self.marks[place][self.unmeasured :] for place in ("step", "update", "end"))
        step = statistics.median(elapsed(a, b) for a, b in pairwise(starts))
        update = statistics.median(elapsed(a, b) for a, b in zip(updates, ends, strict=True))
        whole = (step - update) * STEP / self.sequences + update
        rate, peak = STEP * self.context / whole, peak_flops(self.device)
        times = dict(step_ms=1e3 * step, optimizer_ms=1e3 * update, optimizer_share=update / whole, steps=len(starts))
        mfu = rate * self.flops / peak if peak else None
        return dict(tokens_per_s=rate, mfu=mfu, memory_gb=memory_gb(self.device), sequences=self.sequences, **times)


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


def measure_trainer(settings: tuple[str, ...], size: str, smoke: bool, micro: Any, steps: int, tell: Tell) -> dict:
    """The numbers of the trainer's own loop."""
    sequences = 120 if micro == "auto" else 4 * micro
    batch = (f"batch_size={sequences}", f"micro_batch={micro}", f"steps={steps}", f"log.every={max(1, steps // 3)}")
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        opened(run_arguments(Path(folder), size, smoke, *settings, *batch), TimedTrainer) as t,
    ):
        estimate = memory_estimate(t.run, t.model, t.optimizer, t.world).total(t.micro_batch) / 1e9
        tell(micro_batch=t.micro_batch, attention=attention_of(t), estimate_gb=estimate)
        t.times = StepTimes(t.run.model, t.world.device, steps, t.run.sequences, tell)
        t.times.began = began
        train(t)
        wait = statistics.mean(r["data_ms"] for r in read_metrics(t.folder / METRICS)[1:])
        return t.times.numbers() | dict(data_wait_ms=wait)


def measure_plain(name: str, size: str, smoke: bool, micro: int, steps: int, tell: Tell) -> dict:
    """The numbers of a plain training loop. Its tokens are on the device from the start."""
    device, whole_matrix = torch.device("cpu" if smoke else "cuda"), name == "published"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    c, sequences = TINY if smoke else shape_of(size), 4 * micro
    times = StepTimes(c, device, steps, sequences, tell)
    tell(micro_batch=micro)
    with torch.device(device):
        model = PlainGPT(replace(c, vocab_size=c.padded_vocab_size), whole_matrix)
    forward, parameters = torch.compile(model), list(model.parameters())
    if whole_matrix:
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        update = mars_m_by_tensor(matrices, [p for p in parameters if not any(p is m for m in matrices)])
    else:
        update = torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), fused=True).step
    draw = torch.rand(sequences, c.block_size + 1, device=device)
    tokens = (c.vocab_size**draw - 1).long()  # words as frequent as in the trainer's data, see write_tokens
    for _ in range(steps):
        times.at("step")
        for part in tokens.split(micro):
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(part[:, :-1], part[:, 1:])
            (loss * micro / sequences).backward()
        times.at("update")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update()
        model.zero_grad(set_to_none=True)
        times.at("end")
    if whole_matrix and counters["inductor"]["fuse_attention"]:
        raise RuntimeError("the compiler replaced the whole attention matrix by fused attention")
    return times.numbers()


def measure(name: str, size: str, smoke: bool, micro: Any, steps: int, tell: Tell) -> dict:
    """The numbers of one side, measured in this process. tell: takes numbers as soon as they are known."""
    if name in PLAIN:
        return measure_plain(name, size, smoke, 1 if smoke else micro, steps, tell)
    return measure_trainer(SIDES[name], size, smoke, 1 if smoke else micro, steps, tell)


def measure_elsewhere(s: Session, name: str, size: str, micro: Any, steps: int) -> dict:
    """As `measure`, in a new process; its numbers go into the report's last row as they come."""
    command = [sys.executable, "-m", "bench.gpu", *(["--smoke"] if s.smoke else [])]
    command += [f"--one={name}", f"--size={size}", f"--micro={micro}", f"--steps={steps}"]
    in_own_process(command, s.report.update, **ENVIRONMENT.get(name, {}))
    return {}


def report_side(s: Session, name: str, size: str, micro: Any, steps: int) -> dict:
    """Report a side and return its row. While memory does not suffice, the micro-batch is halved."""
    while True:
        if s.smoke:
            work = partial(measure, name, size, True, micro, steps, s.report.update)
        else:
            work = partial(measure_elsewhere, s, name, size, micro, steps)
        row = s.row(work, BUDGET[size], side=name, size="tiny" if s.smoke else size)
        if row["note"] != "out of memory" or micro in (1, "auto"):
            return row
        micro //= 2


def micro_batch(text: str) -> int | str:
    """A number of sequences, or "auto" for the trainer's choice; for argparse."""
    return text if text == "auto" else at_least(1)(text)


def micro_batches(name: str, size: str, given: list[Any] | None) -> list[Any]:
    """The micro-batches of a side. By default the smaller one of `published` has room for its T x T matrices.

    Raises UserError if the side cannot have one that was given.
    """
    plain, largest = name in PLAIN, max((m for m in given or () if m != "auto"), default=0)
    if plain and "auto" in (given or ()):
        raise UserError(f"--micro auto: only the trainer can choose it, and {name} is not the trainer; give a number")
    if name == "best_autotuned" and largest > MOST_AUTOTUNED:
        raise UserError(f"--micro {largest}: best_autotuned allows at most {MOST_AUTOTUNED} sequences")
    return given or [max(1, MICRO[size] // 4) if name == "published" else MICRO[size]]


@one_line("bench.gpu")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("gpu", __doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["best", "default", *PLAIN])
    parser.add_argument("--micro", nargs="+", type=micro_batch, help="micro-batches to measure, or auto")
    parser.add_argument("--steps", type=at_least(3), default=26, help="steps of each side, a quarter not measured")
    parser.add_argument("--one", choices=SIDES, help="measure this side in this process and print numbers as JSON")
    args = parser.parse_args(argv)
    size, steps = args.size, 4 if args.smoke else args.steps
    if args.one:
        out = sys.stdout  # the trainer's own output goes elsewhere

        def tell(**numbers: object) -> None:
            print(json.dumps(numbers), file=out, flush=True)

        with compiler(args.smoke):
            tell(**measure(args.one, size, args.smoke, args.micro[0], steps, tell))
        return
    sides = [(name, micro) for name in args.sides for micro in micro_batches(name, size, args.micro)]
    session = Session("_".join(["gpu", size, *args.sides, *map(str, args.micro or [])]), args)
    with compiler(args.smoke):
        found = {name: report_side(session, name, size, micro, steps) for name, micro in sides}
    rates = {name: row["tokens_per_s"] for name, row in found.items() if "tokens_per_s" in row}
    for name in PLAIN:
        if rates.keys() >= {"best", name}:
            session.report.add(side=f"best against {name}", size=size, speed_ratio=rates["best"] / rates[name])
    session.report.table()
    if len(rates) < len(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
