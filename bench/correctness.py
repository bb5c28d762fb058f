"""Checks that the fast run on one GPU is correct. Prints a line per check; exit status 1 if a check fails.

python -m bench.correctness                  124M, minutes
python -m bench.correctness --only numbers   a part of the checks
python -m bench.correctness --smoke          a tiny model on the CPU, seconds

numbers: loss and gradients in bf16 and compiled, with flash and with cuDNN attention, against float32.
steady:  after the first steps no compilation, no waiting for the device, and hardly any idle time. The profiler's trace
         of four steps is written beside the results; chrome://tracing and ui.perfetto.dev show it.
resume:  a run that is stopped and resumed equals an uninterrupted one bit for bit.
Checks that need a GPU are not measured without one.
"""

import gzip
import io
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import train_gpt
from bench.gpu import SIDES
from bench.report import bench_parser
from bench.runs import MICRO, attention_of, batch_of, opened, run_arguments, take_step
from bench.timing import SIZES, Session, compiler
from runtime.command import first_line, one_line
from train_gpt import Trainer

NO_GPU, NO_EVENTS = "needs a CUDA GPU", "the profiler sees no work of the GPU here; it may lack the permission"
CHECKS = ["numbers", "steady", "resume"]
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace


def check(
    s: Session, what: str, bound: float, measure: Callable[[], float | str], budget: float = 150, keep: bool = False
) -> None:
    """Report whether the number that measure() returns is at most `bound`.

    measure() may return a text instead, which says why there is no number.
    """

    def verdict() -> dict:
        try:
            found = measure()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # for example a graph that does not compile
            return dict(found=first_line(error), result="FAIL")
        if isinstance(found, str):
            return dict(found=found, result="not measured")
        return dict(found=found, result="ok" if found <= bound else "FAIL")

    s.row(verdict, budget, keep, block="check", what=what, bound=bound)


# ---- loss and gradients


def gradients(arguments: Callable[..., list[str]], *settings: str) -> dict[str, Any]:
    """The gradients of the first step by parameter name, and "loss", on the CPU; "attention" names its kernel."""
    with opened(arguments(*settings)) as t:
        if "dtype=float32" in settings:
            torch.set_float32_matmul_precision("highest")
        kernel, loss = attention_of(t), t.accumulate(batch_of(t, 0), 0)
        gradients = {name: p.grad for name, p in t.model.named_parameters() if p.grad is not None}
        return {name: x.detach().cpu() for name, x in (gradients | {"loss": loss}).items()} | {"attention": kernel}


def loss_error(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """The relative error of the loss."""
    return ((found["loss"] - reference["loss"]) / reference["loss"]).abs().item()


def gradient_error(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """|gradient - reference| / |reference| of the parameter for which it is largest; NaN if one is NaN."""
    names = reference.keys() - {"loss", "attention"}
    return torch.stack([(found[n] - reference[n]).norm() / reference[n].norm() for n in names]).max().item()


def check_numbers(s: Session, arguments: Callable[..., list[str]]) -> None:
    """Loss and gradients of the first step against eager float32, the checks that matter most first."""
    gradients_of = cache(partial(gradients, arguments))

    def compare(error: Callable, kernel: str, *settings: str) -> float | str:
        found = gradients_of(*settings)
        if kernel and kernel != found["attention"]:
            return f"attention runs in {found['attention']} here"
        return error(found, gradients_of("dtype=float32", "compile=false"))

    eager = ("dtype=bfloat16", "compile=false")
    for name, kernel, settings, loss_bound, bound in (
        ("bf16 compiled", "", ("dtype=bfloat16", "compile=true"), 1e-3, 0.03),
        ("bf16 eager, flash attention", "flash", (*eager, "attention=flash"), 1e-3, 0.03),
        ("bf16 eager, cuDNN attention", "cudnn", (*eager, "attention=cudnn"), 1e-3, 0.03),
        ("the side best of bench.gpu", "", SIDES["best"], 2e-3, 0.1),  # the residual stream is bf16, too
        ("float32 compiled", "", ("dtype=float32", "compile=true"), 1e-5, 1e-3),
    ):
        what = f"{name} against float32 eager"
        check(s, f"{what}: loss, relative", loss_bound, partial(compare, loss_error, kernel, *settings))
        worst = partial(compare, gradient_error, kernel, *settings)
        check(s, f"{what}: gradient of the worst tensor, relative", bound, worst)


# ---- stop and resume


def state_hashes(folder: Path, step: int) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint."""
    return json.loads((folder / f"runs/run/checkpoints/step_{step:07d}/state.json").read_text())["sha256"]


def run_to_the_end(arguments: list[str]) -> None:
    """Run train_gpt without its output. Raises RuntimeError with its message if it fails."""
    try:
        with redirect_stdout(io.StringIO()):
            train_gpt.main(arguments)
    except SystemExit as error:
        raise RuntimeError(str(error)) from None


def check_resume(s: Session, folder: Path, size: str, steps: int = 6) -> None:
    """Weights and optimizer state of a run that was stopped and resumed, against an uninterrupted run."""
    settings = ["optimizer=mars_m", "n_layer=4", "batch_size=16", "micro_batch=8", f"steps={steps}"]
    accumulate = Trainer.accumulate

    def stop_in_the_middle(self: Trainer, batch: Tensor, step: int) -> Tensor:
        if step == steps // 2 - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # a thread receives it; the steps of a tiny model would be over before
        return accumulate(self, batch, step)

    def differing_files() -> float:
        whole, stopped = folder / "whole", folder / "stopped"
        arguments = [run_arguments(place, size, s.smoke, *settings, "deterministic=true") for place in (whole, stopped)]
        run_to_the_end(arguments[0])
        with mock.patch.object(Trainer, "accumulate", stop_in_the_middle):
            run_to_the_end(arguments[1])
        if (stopped / f"runs/run/checkpoints/step_{steps:07d}").exists():
            raise RuntimeError("the run did not stop")
        run_to_the_end(arguments[1])
        one, two = state_hashes(whole, steps), state_hashes(stopped, steps)
        return sum(one.get(name) != two.get(name) for name in one | two)

    what = f"deterministic mode, stopped at step {steps // 2} of {steps} and resumed: files that differ"
    check(s, what, 0, differing_files, 300)


# ---- after the first steps


def synchronizations(t: Trainer, batches: list[Tensor]) -> float | str:
    """How often the host waits for the device in some steps. The first place in the code is printed."""
    if t.world.device.type != "cuda":
        return NO_GPU
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                take_step(t, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    if waits:
        print(f"the host waits for the device at {waits[0].filename}:{waits[0].lineno}", file=sys.stderr)
    return len(waits)


def compilations(t: Trainer, batches: list[Tensor]) -> float:
    """Graphs compiled after three steps, while the learning rate and gamma change."""
    for batch in batches[:3]:
        take_step(t, batch)
    before, rates = counters["stats"]["unique_graphs"], []
    for batch in batches:
        take_step(t, batch)
        rates.append({(group["lr"], group["gamma"]) for group in t.optimizer.param_groups})
    assert before > 0, "nothing was compiled"
    assert all(not a & b for a, b in pairwise(rates)), "lr and gamma did not change"
    return counters["stats"]["unique_graphs"] - before


def gpu_events(work: Callable[[], object], path: Path) -> list[dict]:
    """What the GPU does during work(): its kernels, copies and fills, as in the trace that is written to `path`.

    Each has "cat", "name", "ts" and "dur" (microseconds). Named ranges are left out, because they include idle time.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [e for e in events if e.get("cat") in ON_GPU]


def idle_fraction(events: list[dict]) -> float:
    """The fraction of the time between the first and the last event in which no event is active."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def by_kernel(events: list[dict], least: float = 0.01) -> dict[str, float]:
    """The fraction of the busy time of each kernel, largest first; fractions below `least` are left out."""
    sums: Counter[str] = Counter()
    for e in events:
        sums[e["name"]] += e["dur"]
    total = sum(sums.values())
    return {name: time / total for name, time in sums.most_common() if time / total >= least}


def check_steady(s: Session, arguments: list[str]) -> None:
    """A compiled run after its first steps. The checks share one trainer, and the first one compiles it."""
    events: list[dict] = []
    missing = NO_EVENTS if s.device.type == "cuda" else NO_GPU
    with opened(arguments) as t:
        batches = [batch_of(t, step) for step in range(4)]

        def steps() -> None:
            for batch in batches:
                take_step(t, batch)

        def idle() -> float | str:
            if s.device.type == "cuda":
                events.extend(gpu_events(steps, s.report.path.with_suffix(".trace.json.gz")))
            return idle_fraction(events) if events else missing

        def copies() -> float | str:
            return float(sum("DtoH" in e["name"] for e in events)) if events else missing

        what = "graphs compiled after the first steps while lr and gamma change"
        check(s, what, 0, lambda: compilations(t, batches), 240, keep=True)
        check(s, "waits of the host for the device in 4 steps", 0, lambda: synchronizations(t, batches), keep=True)
        check(s, "fraction of 4 steps in which the GPU is idle", 0.05, idle, keep=True)
        check(s, "copies from the device to the host in these steps", 0, copies)
    for name, fraction in by_kernel(events).items() if events else ():
        s.report.add(block="kernel", name=name[:100], fraction=fraction)


@one_line("bench.correctness")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("correctness", __doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="default: all")
    args = parser.parse_args(argv)
    # cuBLAS reads this at its first use, so it must be set long before the run in deterministic mode
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parts = [] if args.only == CHECKS else args.only
    session = Session("_".join(["correctness", args.size, *parts]), args)
    with tempfile.TemporaryDirectory() as name, compiler(args.smoke):
        folder, micro = Path(name), MICRO[args.size]
        arguments = partial(run_arguments, folder, args.size, args.smoke)
        if "numbers" in args.only:
            check_numbers(session, partial(arguments, "batch_size=8", "micro_batch=4", "steps=1"))
        if "steady" in args.only:
            steady = ("optimizer=mars_m", "moves=gamma:0.05", "warmup=100", "steps=200", "compile=true")
            check_steady(session, arguments(*steady, f"batch_size={micro}", f"micro_batch={micro // 4}"))
        if "resume" in args.only:
            check_resume(session, folder, args.size)
    session.report.table(by="block")
    if any(row.get("result") == "FAIL" for row in session.report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
