"""The optimizer step alone, on the parameters of a GPT-2, all sides taking turns on one thread.

python -m bench.optimizer_step              GPT-2 small, minutes
python -m bench.optimizer_step --smoke      a tiny model, seconds
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from bench.peers import published_mars
from bench.report import Report, interleaved
from model import GPT, GPTConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig, build_optimizer


def torch_muon(matrices: list[Tensor], rest: list[Tensor]) -> Callable[[], None]:
    """torch.optim.Muon and AdamW on the split that ours uses, Newton-Schulz in float32 like ours on a CPU."""
    muon = torch.optim.Muon(matrices, lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        adamw.step()

    return step


def bench(shape: GPTConfig, rounds: int, compiled: bool, report: Report) -> None:
    """Time every side and report seconds and ratios."""
    torch.manual_seed(0)
    model = GPT(shape)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)
    roles = model.parameter_roles()
    matrices = [p for n, p in model.named_parameters() if roles[n] == "matrix"]
    rest = [p for n, p in model.named_parameters() if roles[n] != "matrix"]

    sides = {
        "AdamW fused (torch)": torch.optim.AdamW(params, lr=1e-3, fused=True).step,
        "AdamW foreach (torch)": torch.optim.AdamW(params, lr=1e-3, foreach=True).step,
        "MARS-AdamW per parameter, as published": published_mars(params),
        "MARS-AdamW": build_optimizer(model, MARSConfig()).step,
    }
    if compiled:
        sides["MARS-AdamW compiled"] = build_optimizer(model, MARSConfig(), compiled=True).step
    seconds = interleaved(sides, rounds)
    for name, s in seconds.items():
        fused, foreach, published = list(seconds.values())[:3]
        report.add(optimizer=name, seconds=s, to_fused=s / fused, to_foreach=s / foreach, to_published=s / published)
    sides.clear()

    sides = {
        "Muon + AdamW (torch)": torch_muon(matrices, rest),
        "Muon": build_optimizer(model, MuonConfig()).step,
        "MARS-M clipped": build_optimizer(model, MARSMConfig()).step,
        "MARS-M one buffer": build_optimizer(model, MARSMConfig(clip_c=False)).step,
    }
    seconds = interleaved(sides, max(1, rounds // 2))
    for name, s in seconds.items():
        report.add(optimizer=name, seconds=s, to_torch_muon=s / seconds["Muon + AdamW (torch)"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.optimizer_step")
    parser.add_argument("--smoke", action="store_true", help="tiny model, seconds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compiled", action="store_true", help="also the compiled rules: minutes of compilation")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=500) if args.smoke else GPTConfig()
    report = Report("optimizer_step_smoke" if args.smoke else "optimizer_step", torch.device("cpu"))
    bench(shape, 2 if args.smoke else args.rounds, args.compiled, report)
    report.table()


if __name__ == "__main__":
    main()
