"""What each setting brings on one GPU: the trainer itself with one setting more on each rung, beside its peers.

python -m bench.ladder                               124M, every rung
python -m bench.ladder --size 1558M --rungs best nanogpt --micro 16 30
python -m bench.ladder --smoke                       a tiny model on the CPU, seconds

loss_in_graph, cudnn, bf16_residual and cast_once add up; best is cast_once with MARS-M; the others change one thing.
The peers are plain PyTorch: nanogpt is written as nanoGPT is, loss_outside compiles the model without its loss,
materialized forms the whole attention matrix and steps MARS-M tensor by tensor.

Every rung runs in a process of its own, against its own budget of time. Tokens/s, MFU and the optimizer's share are
those of a step of 480 sequences, from the measured times of a forward and backward pass and of an update. MFU is
given by two conventions: PaLM's, which counts masked attention, and exactly what causal attention has to compute.
"""

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.peers import PlainGPT, plain_loss, published_mars_m
from bench.runs import MICRO, opened, run_arguments
from bench.timing import ROOT, SIZES, TINY, Session, arguments, compiler, elapsed, mark, shape_of
from model import GPT, GPTConfig
from runtime.hardware import memory_gb, peak_flops
from runtime.logger import METRICS, read_metrics
from train_gpt import train

STEP = 480  # sequences of a step that figures are stated for
WHOLE = {"124M": 480, "355M": 480, "774M": 240, "1558M": 120}  # sequences of a measured step of the best rung, about
BUDGET = {"124M": 150, "355M": 240, "774M": 300, "1558M": 420}  # seconds a rung, compilation included


@dataclass(frozen=True)
class Rung:
    """One line of the ladder: settings of the trainer, or a peer."""

    settings: tuple[str, ...] = ()
    peer: str = ""
    environment: dict[str, str] = field(default_factory=dict)


GRAPH = ("optimizer=adamw", "dtype=bfloat16", "compile=true", "attention=flash")
CUDNN = (*GRAPH, "attention=cudnn")
RESIDUAL = (*CUDNN, "residual=bfloat16")
CAST = (*RESIDUAL, "cast_weights=step")
TUNED = {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}
RUNGS = {  # in this order, as far as the time goes
    "best": Rung((*CAST, "optimizer=mars_m")),
    "nanogpt": Rung(peer="nanogpt"),
    "materialized": Rung(peer="materialized"),
    "loss_outside": Rung(peer="loss_outside"),
    "loss_in_graph": Rung(GRAPH),
    "cudnn": Rung(CUDNN),
    "bf16_residual": Rung(RESIDUAL),
    "cast_once": Rung(CAST),
    "deterministic": Rung((*CAST, "attention=flash", "deterministic=true")),
    "checkpointing": Rung((*CAST, "activation_checkpointing=true")),
    "max_autotune": Rung(CAST, environment=TUNED),
}


class Watch:
    """Marks where the steps of a loop begin, where their updates begin, and where these end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.first = device, time.perf_counter(), 0.0
        self.marks: dict[str, list] = {"step": [], "update": [], "end": []}

    def at(self, place: str) -> None:
        self.marks[place].append(mark(self.device))
        if place == "end" and not self.first:  # all has been compiled now
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.first = time.perf_counter() - self.begun

    def figures(self, c: GPTConfig, sequences: int, warmup: int) -> dict:
        """What a rung reports, from all steps after `warmup`; sequences: of a measured step."""
        starts = self.marks["step"][warmup:]
        step = statistics.median(elapsed(a, b) for a, b in pairwise(starts))
        pairs = zip(self.marks["update"][warmup:], self.marks["end"][warmup:], strict=True)
        update = statistics.median(elapsed(a, b) for a, b in pairs)
        whole = (step - update) * STEP / sequences + update
        rate, peak = STEP * c.block_size / whole, peak_flops(self.device)
        with torch.device("meta"):
            flops = {name: GPT(c).flops_per_token(name) for name in ("palm", "causal")}
        shares = {f"mfu_{name}": rate * n / peak if peak else None for name, n in flops.items()}
        times = dict(step_ms=1e3 * step, optimizer_ms=1e3 * update, optimizer_share=update / whole)
        return dict(tokens_per_s=rate, **shares, memory_gb=memory_gb(self.device), compile_s=self.first - step, **times)


def measure_trainer(
    settings: tuple[str, ...], size: str, smoke: bool, sequences: int, micro: int | str, steps: int
) -> dict:
    """Run the trainer's own loop, without its evaluation and its checkpoint at the end."""
    warmup = 1 if smoke else 5
    sizes = (f"batch_size={sequences}", f"micro_batch={micro}", f"steps={steps}", f"log.every={2 if smoke else 10}")
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        words = run_arguments(Path(name), size, smoke, *settings, *sizes)
        with opened(words) as t:
            watch = Watch(t.world.device)
            accumulate, clip, update = t.accumulate, t.clipper.clip, t.update

            def timed_accumulate(*args: Any) -> torch.Tensor:
                watch.at("step")
                return accumulate(*args)

            def timed_clip(step: int) -> torch.Tensor:
                watch.at("update")
                return clip(step)

            def timed_update() -> None:
                update()
                watch.at("end")

            t.accumulate, t.clipper.clip, t.update = timed_accumulate, timed_clip, timed_update
            t.evaluate, t.save, t.saved_step = lambda stop: None, lambda: None, t.steps
            train(t)
            figures = watch.figures(t.run.model, t.run.sequences, warmup)
            waited = statistics.mean(r["data_ms"] for r in read_metrics(t.folder / METRICS)[1:])
            return figures | dict(
                data_wait_ms=waited, sequences=t.run.sequences, micro_batch=t.run.sequences // t.accumulation
            )


def measure_peer(peer: str, size: str, smoke: bool, sequences: int, micro: int, steps: int) -> dict:
    """A training loop as others write it, on tokens that are on the device already."""
    device = torch.device("cpu" if smoke else "cuda")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    c = TINY if smoke else shape_of(size)
    with torch.device(device):
        model = PlainGPT(replace(c, vocab_size=c.padded_vocab_size), peer == "materialized")
    forward, parameters = torch.compile(model), list(model.parameters())
    embeddings = (model.tokens.weight, model.positions.weight)
    if peer == "materialized":
        matrices = [p for p in parameters if p.dim() == 2 and not any(p is e for e in embeddings)]
        update = published_mars_m(matrices, [p for p in parameters if not any(p is m for m in matrices)])
    else:
        update = torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), fused=True).step
    tokens = torch.randint(c.vocab_size, (sequences, c.block_size + 1), device=device)
    watch = Watch(device)
    for _ in range(steps):
        watch.at("step")
        for part in tokens.split(micro):
            with torch.autocast(device.type, torch.bfloat16):
                if peer == "loss_outside":
                    loss = plain_loss(forward(part[:, :-1]), part[:, 1:])
                else:
                    loss = forward(part[:, :-1], part[:, 1:])
            (loss * micro / sequences).backward()
        watch.at("update")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update()
        model.zero_grad(set_to_none=True)
        watch.at("end")
    figures = watch.figures(c, sequences, 1 if smoke else 5) | dict(sequences=sequences, micro_batch=micro)
    if peer == "materialized" and counters["inductor"]["fuse_attention"]:
        raise RuntimeError("the compiler fused the attention that was to be materialized")
    return figures


def micro_batch(text: str) -> int | str:
    """A number of sequences, or "auto": the trainer chooses."""
    return text if text == "auto" else int(text)


def sequences_of(name: str, size: str, micro: int | str) -> int:
    """Sequences of a measured step: two micro-batches, of the best rung about as many as in training."""
    if micro == "auto":
        return WHOLE[size]
    return max(1, WHOLE[size] // micro) * micro if name == "best" else 2 * micro


def default_micro(name: str, size: str) -> int | str:
    """The trainer's choice for the best rung; of attention that is materialized, the T x T matrices take the memory."""
    return {"best": "auto", "materialized": max(1, MICRO[size] // 4)}.get(name, MICRO[size])


def measure(name: str, size: str, smoke: bool, micro: int | str) -> dict:
    """One rung, in this process."""
    rung, steps, sequences = RUNGS[name], 4 if smoke else 26, sequences_of(name, size, micro)
    if rung.peer:
        return measure_peer(rung.peer, size, smoke, *((4, 2) if smoke else (sequences, micro)), steps)
    return measure_trainer(rung.settings, size, smoke, sequences, micro, steps)


def in_own_process(name: str, size: str, smoke: bool, micro: int | str) -> dict:
    """The same in another process, which goes when this call is left. Raises what it ended with, if it failed."""
    command = [sys.executable, "-m", "bench.ladder", f"--size={size}", f"--one={name}", f"--micro={micro}"]
    process = subprocess.Popen(
        [*command, "--smoke"] if smoke else command,
        **dict(cwd=ROOT, env=os.environ | RUNGS[name].environment, text=True, start_new_session=True),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    )
    try:
        output, errors = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its compilers
            process.wait()
    if process.returncode:
        said = [line for line in errors.splitlines() if "error" in line.lower()] or [
            f"exit status {process.returncode}"
        ]
        raise (torch.OutOfMemoryError if "OutOfMemoryError" in said[-1] else RuntimeError)(said[-1])
    return json.loads(output.splitlines()[-1])


def climb(s: Session, name: str, size: str, micro: int | str) -> dict:
    """Report a rung, at half the micro-batch as long as the memory is not enough; returns its figures."""
    names = dict(rung=name, size="tiny" if s.smoke else size)
    run = measure if s.smoke else in_own_process
    while True:
        found = s.row(partial(run, name, size, s.smoke, micro), BUDGET[size], **names)
        if found or s.report.rows[-1]["note"] != "out of memory" or micro in (1, "auto"):
            return found
        micro //= 2


def main(argv: list[str] | None = None) -> None:
    parser = arguments("ladder", __doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, help="default: all; 355M and 774M: best")
    parser.add_argument(
        "--micro", nargs="+", type=micro_batch, help="sequences of a forward pass, or auto; a line for each"
    )
    parser.add_argument("--one", choices=RUNGS, help="measure this rung here and print its figures as JSON")
    args = parser.parse_args(argv)
    size, where = args.size, (args.smoke, args.folder)
    if args.one:
        with compiler(args.smoke):
            print(json.dumps(measure(args.one, size, args.smoke, args.micro[0])))
        return
    session = Session("_".join(["ladder", size, *map(str, [*(args.rungs or []), *(args.micro or [])])]), *where)
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
