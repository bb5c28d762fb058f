"""Whether the fast run on one GPU is the right one: a line per check, and exit status 1 if one of them fails.

python -m bench.correctness                124M, minutes
python -m bench.correctness --size 1558M
python -m bench.correctness --smoke        a tiny model on the CPU, seconds

Compiled against eager, bf16 against float32, stop and resume bit for bit, no waiting for the device, no compilation
after the first steps, and how much of the time the GPU has nothing to do. Checks that want a GPU say so without one.
"""

import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import train_gpt
from bench.runs import MICRO, batch_of, opened, run_arguments, take_step
from bench.timing import SIZES, Session, arguments
from bench.trace import by_kernel, idle_share, trace_of

NO_GPU = "needs a CUDA GPU"


def check(
    s: Session, what: str, bound: float, measure: Callable[[], float | str], budget: float = 150, keep: bool = False
) -> None:
    """A line: measure() gives a number that must not exceed the bound, or says why there is none."""

    def verdict() -> dict:
        try:
            found = measure()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's, from a sync that is forbidden to a graph that does not compile
            return dict(found=(str(error).splitlines() or [type(error).__name__])[0][:120], result="FAIL")
        if isinstance(found, str):
            return dict(found=found, result="not measured")
        return dict(found=found, result="ok" if found <= bound else "FAIL")

    s.row(verdict, budget, keep, block="check", what=what, bound=bound)


# ---- numbers


def gradients(make: Callable[..., list[str]], *settings: str) -> dict[str, Tensor]:
    """The gradient of the first step by parameter name, and "loss", on the CPU."""
    with opened(make(*settings)) as t:
        if "dtype=float32" in settings:
            torch.set_float32_matmul_precision("highest")
        loss = t.accumulate(batch_of(t, 0), 0)
        found = {name: p.grad for name, p in t.model.named_parameters()} | {"loss": loss}
        return {name: x.detach().cpu() for name, x in found.items()}


def loss_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return ((found["loss"] - reference["loss"]) / reference["loss"]).abs().item()


def gradient_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """|g - reference| / |reference| of the parameter where that is largest."""
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in reference.items() if n != "loss")


def check_numbers(s: Session, make: Callable[..., list[str]]) -> None:
    """The first step's loss and gradients, of all ways to compute them, against float32 without a compiler."""
    known: dict[tuple[str, str], dict[str, Tensor]] = {}

    def of(dtype: str, compiled: str) -> dict[str, Tensor]:
        if (dtype, compiled) not in known:
            known[dtype, compiled] = gradients(make, f"dtype={dtype}", f"compile={compiled}")
        return known[dtype, compiled]

    def compare(error: Callable, dtype: str, compiled: str) -> float:
        return error(of(dtype, compiled), of("float32", "false"))

    for name, way, loss_bound, bound in (
        ("float32 compiled", ("float32", "true"), 1e-5, 1e-3),
        ("bf16 eager", ("bfloat16", "false"), 1e-3, 0.03),
        ("bf16 compiled", ("bfloat16", "true"), 1e-3, 0.03),
    ):
        against = f"{name} against float32 eager"
        check(s, f"{against}: loss, relative", loss_bound, partial(compare, loss_error, *way))
        check(s, f"{against}: gradient of the worst tensor, relative", bound, partial(compare, gradient_error, *way))


# ---- stop and resume


def state_hashes(folder: Path, step: int) -> dict[str, str]:
    return json.loads((folder / f"runs/run/checkpoints/step_{step:07d}/state.json").read_text())["sha256"]


def run_to_its_end(arguments: list[str]) -> None:
    """train_gpt.main, without its lines; raises RuntimeError with what it has to say if it gives up."""
    try:
        with redirect_stdout(io.StringIO()):
            train_gpt.main(arguments)
    except SystemExit as error:
        raise RuntimeError(str(error)) from None


def check_resume(s: Session, folder: Path, size: str, steps: int = 6) -> None:
    """Weights and optimizer state of four layers after a stop in the middle and a second start, against one run."""
    settings = (
        "optimizer=mars_m",
        "n_layer=4",
        "batch_size=16",
        "micro_batch=8",
        f"steps={steps}",
        "deterministic=true",
    )
    accumulate = train_gpt.Trainer.accumulate

    def stop_in_the_middle(self: train_gpt.Trainer, batch: Tensor, step: int) -> Tensor:
        if step == steps // 2 - 1:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(self, batch, step)

    def differing_files() -> float:
        straight = run_arguments(folder / "straight", size, s.smoke, *settings)
        stopped = run_arguments(folder / "stopped", size, s.smoke, *settings)
        run_to_its_end(straight)
        with mock.patch.object(train_gpt.Trainer, "accumulate", stop_in_the_middle):
            run_to_its_end(stopped)
        if (folder / f"stopped/runs/run/checkpoints/step_{steps:07d}").exists():
            raise RuntimeError("the run did not stop")
        run_to_its_end(stopped)
        one, two = state_hashes(folder / "straight", steps), state_hashes(folder / "stopped", steps)
        return sum(one.get(name) != two.get(name) for name in one | two)

    what = f"deterministic mode, stopped at step {steps // 2} of {steps} and resumed: files that differ"
    check(s, what, 0, differing_files, 300)


# ---- the steady state


def synchronizations(t: train_gpt.Trainer, batches: list[Tensor]) -> float | str:
    """How often the host waits for the device in some steps; names the first place where it does."""
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


def compilations(t: train_gpt.Trainer, batches: list[Tensor]) -> float:
    """Graphs compiled during some steps in which the learning rate and gamma change."""
    before, rates = counters["stats"]["unique_graphs"], []
    for batch in batches:
        take_step(t, batch)
        rates.append({(group["lr"], group["gamma"]) for group in t.optimizer.param_groups})
    assert before > 0, "nothing was compiled"
    assert all(not a & b for a, b in pairwise(rates)), "lr and gamma did not move"
    return counters["stats"]["unique_graphs"] - before


def check_steady(s: Session, make: Callable[..., list[str]], size: str, folder: Path) -> None:
    """A compiled MARS-M run after its first steps."""
    batch = (f"batch_size={MICRO[size]}", f"micro_batch={MICRO[size] // 4}")
    arguments = make("optimizer=mars_m", "gamma_end=0.05", "warmup=100", "steps=200", "compile=true", *batch)
    events: list[dict] = []
    with ExitStack() as stack:

        @cache
        def warm() -> tuple[train_gpt.Trainer, list[Tensor]]:
            t = stack.enter_context(opened(arguments))
            batches = [batch_of(t, step) for step in range(4)]
            for batch in batches[:3]:
                take_step(t, batch)
            return t, batches

        def idle() -> float | str:
            if s.device.type != "cuda":
                return NO_GPU
            t, batches = warm()
            events.extend(trace_of(lambda: [take_step(t, batch) for batch in batches], folder / "trace.json"))
            return idle_share(events)

        def copies() -> float | str:
            return float(sum("DtoH" in e["name"] for e in events)) if events else NO_GPU

        what = "graphs compiled after the first steps while lr and gamma move"
        check(s, what, 0, lambda: compilations(*warm()), 240, keep=True)
        check(s, "waits of the host for the device in 4 steps", 0, lambda: synchronizations(*warm()), keep=True)
        check(s, "share of 4 steps in which the GPU is idle", 0.02, idle, keep=True)
        check(s, "copies from the device to the host in these steps", 0, copies)
    for name, share in by_kernel(events).items() if events else ():
        s.report.add(block="kernel", name=name[:100], share=share)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("correctness", __doc__)
    parser.add_argument("--size", choices=SIZES, default="124M")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic mode, which comes last: too late
    session = Session(f"correctness_{args.size}", args.smoke, args.folder, backend="aot_eager")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = partial(run_arguments, folder, args.size, args.smoke, "batch_size=8", "micro_batch=4", "steps=1")
        check_numbers(session, make)
        check_steady(session, make, args.size, folder)
        check_resume(session, folder, args.size)
    session.report.table(by="block")
    if any(row.get("result") == "FAIL" for row in session.report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
