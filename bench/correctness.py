"""Checks that the fast run on one GPU is correct. Prints a line per check; exit status 1 if a check fails.

python -m bench.correctness                124M, minutes
python -m bench.correctness --size 1558M
python -m bench.correctness --smoke        a tiny model on the CPU, seconds

The checks: compiled against eager, bf16 against float32, resume bit for bit, no waiting for the device, no compilation
after the first steps, and the time in which the GPU is idle. Checks that need a GPU are not measured without one.
"""

import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import train_gpt
from bench.ladder import RUNGS
from bench.report import bench_parser
from bench.runs import MICRO, batch_of, opened, run_arguments, take_step
from bench.timing import SIZES, Session
from bench.trace import by_kernel, idle_fraction, trace_of
from runtime.command import first_line, one_line
from train_gpt import Trainer

NO_GPU = "needs a CUDA GPU"


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


def gradients(arguments: Callable[..., list[str]], *settings: str) -> dict[str, Tensor]:
    """The gradients of the first step by parameter name, and "loss", on the CPU."""
    with opened(arguments(*settings)) as t:
        if "dtype=float32" in settings:
            torch.set_float32_matmul_precision("highest")
        loss = t.accumulate(batch_of(t, 0), 0)
        gradients = {name: p.grad for name, p in t.model.named_parameters() if p.grad is not None}
        return {name: x.detach().cpu() for name, x in (gradients | {"loss": loss}).items()}


def loss_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The relative error of the loss."""
    return ((found["loss"] - reference["loss"]) / reference["loss"]).abs().item()


def gradient_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """|gradient - reference| / |reference| of the parameter for which it is largest."""
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in reference.items() if n != "loss")


def check_numbers(s: Session, arguments: Callable[..., list[str]]) -> None:
    """Loss and gradients of the first step against eager float32: compiled, in bf16, and as the rung best."""
    gradients_of = cache(partial(gradients, arguments))

    def compare(error: Callable, *settings: str) -> float:
        return error(gradients_of(*settings), gradients_of("dtype=float32", "compile=false"))

    for name, settings, loss_bound, bound in (
        ("float32 compiled", ("dtype=float32", "compile=true"), 1e-5, 1e-3),
        ("bf16 eager", ("dtype=bfloat16", "compile=false"), 1e-3, 0.03),
        ("bf16 compiled", ("dtype=bfloat16", "compile=true"), 1e-3, 0.03),
        ("the rung best of bench.ladder", RUNGS["best"], 2e-3, 0.1),  # the residual stream is bf16, too
    ):
        what = f"{name} against float32 eager"
        check(s, f"{what}: loss, relative", loss_bound, partial(compare, loss_error, *settings))
        worst = partial(compare, gradient_error, *settings)
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


def check_steady(s: Session, arguments: list[str], folder: Path) -> None:
    """A compiled run after its first steps. The checks share one trainer, and the first one compiles it."""
    events: list[dict] = []
    with opened(arguments) as t:
        batches = [batch_of(t, step) for step in range(4)]

        def steps() -> None:
            for batch in batches:
                take_step(t, batch)

        def idle() -> float | str:
            if s.device.type != "cuda":
                return NO_GPU
            events.extend(trace_of(steps, folder / "trace.json"))
            return idle_fraction(events)

        def copies() -> float | str:
            return float(sum("DtoH" in e["name"] for e in events)) if events else NO_GPU

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
    args = parser.parse_args(argv)
    # cuBLAS reads this at its first use, so it must be set long before the run in deterministic mode
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    session = Session(f"correctness_{args.size}", args)
    with tempfile.TemporaryDirectory() as name:
        folder, micro = Path(name), MICRO[args.size]
        arguments = partial(run_arguments, folder, args.size, args.smoke)
        check_numbers(session, partial(arguments, "batch_size=8", "micro_batch=4", "steps=1"))
        steady = ("optimizer=mars_m", "moves=gamma:0.05", "warmup=100", "steps=200", "compile=true")
        batch = (f"batch_size={micro}", f"micro_batch={micro // 4}")
        check_steady(session, arguments(*steady, *batch), folder)
        check_resume(session, folder, args.size)
    session.report.table(by="block")
    if any(row.get("result") == "FAIL" for row in session.report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
