"""The optimizer step alone, on the parameters of a GPT-2. All optimizers take turns on one thread.

python -m bench.optimizer_step              GPT-2 small, minutes
python -m bench.optimizer_step --smoke      a tiny model, seconds
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.peers import published_mars
from bench.report import Report, bench_parser, interleaved, results_folder
from bench.runs import split_parameters
from model import GPT, GPTConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig, build_optimizer
from runtime.command import at_least, one_line
from training.average import WeightAverage


def torch_muon(matrices: list[Tensor], rest: list[Tensor]) -> Callable[[], None]:
    """torch.optim.Muon with AdamW for the rest. Its Newton-Schulz uses float32, as ours does on a CPU."""
    muon = torch.optim.Muon(matrices, lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        adamw.step()

    return step


def bench(shape: GPTConfig, rounds: int, compiled: bool, report: Report) -> None:
    """Report seconds per step, and ratios to the fused, the foreach and the published optimizer."""
    torch.manual_seed(0)
    model = GPT(shape)
    params: list[Tensor] = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)

    sides: dict[str, Callable[[], Any]] = {
        "AdamW fused (torch)": torch.optim.AdamW(params, lr=1e-3, fused=True).step,
        "AdamW foreach (torch)": torch.optim.AdamW(params, lr=1e-3, foreach=True).step,
        "MARS-AdamW per parameter, as published": published_mars(params),
        "MARS-AdamW": build_optimizer(model, MARSConfig()).step,
    }
    if compiled:
        sides["MARS-AdamW compiled"] = build_optimizer(model, MARSConfig(), compiled=True).step
    sides["average of the weights"] = partial(WeightAverage(model, 0.999, None).update, 10**6)
    seconds = interleaved(sides, rounds)
    fused, foreach, published, *_ = seconds.values()
    for name, s in seconds.items():
        report.add(optimizer=name, seconds=s, to_fused=s / fused, to_foreach=s / foreach, to_published=s / published)
    sides.clear()  # frees the memory of these optimizers

    sides = {
        "Muon + AdamW (torch)": torch_muon(*split_parameters(model)),
        "Muon": build_optimizer(model, MuonConfig()).step,
        "MARS-M clipped": build_optimizer(model, MARSMConfig()).step,
        "MARS-M one buffer": build_optimizer(model, MARSMConfig(clip_c=False)).step,
    }
    seconds = interleaved(sides, max(1, rounds // 2))
    for name, s in seconds.items():
        report.add(optimizer=name, seconds=s, to_torch_muon=s / seconds["Muon + AdamW (torch)"])


@one_line("bench.optimizer_step")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("optimizer_step", __doc__)
    parser.add_argument("--rounds", type=at_least(1), default=6)
    parser.add_argument("--compiled", action="store_true", help="also the compiled update; compiling takes minutes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=500) if args.smoke else GPTConfig()
    report = Report("optimizer_step", results_folder(args))
    bench(shape, 2 if args.smoke else args.rounds, args.compiled, report)
    report.table()


if __name__ == "__main__":
    main()
