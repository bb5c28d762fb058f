"""Memory of a training step against the estimate of --preflight: python -m bench.memory

Each row is a run of the trainer in a process of its own: three steps of two micro-batches on random tokens. "peak" is
the largest sum of the allocator's blocks in use in the last step, "estimate" is what `--preflight` and
`--micro_batch=auto` compute without training. Both are in GB; "error" is estimate / peak - 1, in percent.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.report import Report, bench_parser, results_folder
from bench.runs import MICRO, batch_of, in_own_process, opened, run_arguments, take_step
from bench.timing import SIZES
from runtime.command import one_line
from train_gpt import Trainer
from training.preflight import memory_estimate


def step_memory(t: Trainer) -> tuple[int, int]:
    """Bytes at the allocator's peak in the third step, 0 on a CPU, where nothing counts them; and as estimated."""
    gpu = t.world.device.type == "cuda"
    for step in range(3):
        batch = batch_of(t, step)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        take_step(t, batch)
    estimate = memory_estimate(t.run, t.model, t.optimizer, t.world).total(t.micro_batch)
    return torch.cuda.max_memory_allocated() if gpu else 0, estimate


def measure(size: str, optimizer: str, compile: str, micro: int, smoke: bool = False) -> dict:
    """Peak and estimate of one run in this process; on a CPU the estimate alone."""
    settings = [f"optimizer={optimizer}", f"compile={compile}", f"batch_size={2 * micro}", f"micro_batch={micro}"]
    with tempfile.TemporaryDirectory() as folder, opened(run_arguments(Path(folder), size, smoke, *settings)) as t:
        peak, estimate = step_memory(t)
    if not peak:
        return dict(estimate=estimate / 1e9)
    return dict(peak=peak / 1e9, estimate=estimate / 1e9, error=100 * (estimate / peak - 1))


@one_line("bench.memory")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("memory", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "mars_m"])
    parser.add_argument("--compile", nargs="+", choices=("false", "true"), default=["false", "true"])
    parser.add_argument("--one", nargs=4, metavar=("SIZE", "OPTIMIZER", "COMPILE", "MICRO"), help="one run, as JSON")
    args = parser.parse_args(argv)
    if args.one:
        size, optimizer, compile, micro = args.one
        print(json.dumps(measure(size, optimizer, compile, int(micro))))
        return
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("bench.memory: needs a CUDA GPU; --smoke runs tiny shapes on the CPU")
    report = Report("memory", results_folder(args), "cpu" if args.smoke else "cuda")
    sizes, modes = (["124M"], ["false"]) if args.smoke else (args.sizes, args.compile)
    for compile, size, optimizer in itertools.product(modes, sizes, args.optimizers):
        for micro in (2,) if args.smoke else (MICRO[size] // 4, MICRO[size] // 2, MICRO[size]):
            row = dict(size=size, optimizer=optimizer, compile=compile, micro_batch=micro)
            try:
                if args.smoke:
                    row |= measure(size, optimizer, compile, micro, smoke=True)
                else:
                    row |= in_own_process("memory", "--one", *row.values())
            except torch.OutOfMemoryError:
                row |= dict(note="out of memory")
            except RuntimeError as error:
                row |= dict(note=str(error))
            report.add(**row | dict(size="tiny" if args.smoke else size))
    report.table()


if __name__ == "__main__":
    main()
