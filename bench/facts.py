"""What this GPU is, in seconds: python -m bench.facts [--smoke]

Its card, driver and versions, the rate of a copy, one large product, and the attention kernel that each setting runs.
"""

import subprocess
from collections.abc import Callable

import torch

from bench.report import bench_parser
from bench.timing import Session
from runtime.command import one_line
from runtime.hardware import environment, peak_flops
from training.compute import ComputeConfig, attention_kernel, torch_settings

FROM_DRIVER = ("driver_version", "memory.total", "power.limit", "clocks.sm", "clocks.max.sm", "temperature.gpu")


def of_driver() -> dict:
    """What nvidia-smi says about the first card."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(FROM_DRIVER)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return dict(zip(FROM_DRIVER, done.stdout.strip().split(", "), strict=True))


def report_facts(s: Session) -> None:
    """A row for each fact; one that cannot be found has a note instead."""

    def card() -> dict:
        facts = environment(s.device, 1)
        return {key: facts[key] for key in ("device", "commit", "python", "cuda")} | facts["packages"]

    def copy() -> dict:
        a, b = (s.randn(1 << (18 if s.smoke else 28), dtype=torch.float32) for _ in range(2))
        return dict(tb_s=2e-12 * a.nbytes / s.seconds(lambda: b.copy_(a)))

    def product() -> dict:
        n = 128 if s.smoke else 8192
        a, b = s.randn(n, n), s.randn(n, n)
        rate, peak = 2 * n**3 / s.seconds(lambda: a @ b), peak_flops(s.device)
        return dict(tflops=1e-12 * rate, of_peak=rate / peak if peak else None)

    def attention() -> dict:
        found = {}
        for setting in ("auto", "flash", "cudnn"):
            with torch_settings(ComputeConfig(attention=setting)):
                found[setting] = attention_kernel(12, 768, 1024, 0.0, "auto", s.device)
        return found

    facts: dict[str, Callable[[], dict]] = {"card": card, "driver": of_driver, "copy": copy}
    facts |= {"product of 8192 x 8192 in bf16": product, "attention kernel by setting": attention}
    for what, find in facts.items():
        s.row(find, 15, what=what)


@one_line("bench.facts")
def main(argv: list[str] | None = None) -> None:
    args = bench_parser("facts", __doc__).parse_args(argv)
    report_facts(session := Session("facts", args))
    session.report.table(by="what")


if __name__ == "__main__":
    main()
