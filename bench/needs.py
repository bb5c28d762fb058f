"""What a run of each published size needs, on the page docs/what_you_need.md: python -m bench.needs

The numbers of a machine are those of `train_gpt.py config/gpt2_SIZE.py --micro_batch=auto --preflight --as=MACHINE`.
The hours of preparation come from PREPARED in bench/results/.
"""

import json

from bench.report import RESULTS, ROOT
from bench.timing import SIZES
from config.load import load_config
from runtime.command import Parser, one_line, short_count
from runtime.files import write_durably
from runtime.hardware import parse_machines
from runtime.markdown import markdown_table
from training.preflight import ASSUMED_MFU, assumed_rate, gb, needs_of, planned_run
from training.run_config import RunConfig

PAGE = "docs/what_you_need.md"
MACHINES = ("1xH100", "8xA100-40GB", "8xA100-80GB", "8xH100", "2x8xH100")
CORES = (2, 16)
PREPARED = "prepare_cpu-x86_64_2026-11-22"  # processor time of a preparation by the main process and by the workers
# Tokens, and bytes to download. OpenWebText: `download_size` on the card of dvruette/openwebtext, a copy of the same
# 8,013,769 documents in parquet. Shards that others made have two bytes a token. Nobody states the size of the others.
CORPORA: dict[str, tuple[float, float | None]] = {
    "openwebtext": (9e9, 23.9e9),
    "fineweb_edu --sample 10BT": (10e9, None),
    "fineweb_edu --sample 100BT": (100e9, None),
    "pretokenized fineweb_edu_10B": (10e9, 20e9),
    "pretokenized fineweb_edu_100B": (100e9, 200e9),
}
# Requests: one for each answer of each document in the split that lm-eval scores. Most questions of ARC have 4 answers,
# some 3 or 5; its two numbers are those that lm-eval prints.
REQUESTS = {
    "arc_easy": 9501,
    "arc_challenge": 4687,
    "boolq": 3270 * 2,
    "hellaswag": 10_042 * 4,
    "openbookqa": 500 * 4,
    "piqa": 1838 * 2,
    "winogrande": 1267 * 2,
    "mmlu": 14_042 * 4,
    "sciq": 1000 * 4,
}
TEXT = """# What you need

`python -m bench.needs` writes this page. All runs have {tokens} tokens and the optimizer MARS-M, as published.
**Memory and hours are estimates; nobody has measured them.** `--preflight` gives the same numbers for any other run or
machine, without data and without a GPU:

```sh
python train_gpt.py config/gpt2_xl.py --micro_batch=auto --preflight --as=8xA100-80GB
```

- **micro-batch**: the largest number of sequences in one pass that is estimated to fit into a GPU.
- **memory**: estimate for one GPU with this micro-batch, without fragments and scratch memory.
- **hours**: at an assumed MFU of {mfu:.0%}. MFU is the part of the dense bf16 peak that the model's FLOPs use.

{machines}
## Disk for checkpoints

{checkpoints}
The number is the largest that is on the disk at once: the latest, the best, milestones, and the one being written.
`--checkpoint.keep`, `--checkpoint.every` and `--checkpoint.milestone_every` change it.

## Data

{data}
A token takes two bytes on the disk. The download of OpenWebText is that of a copy whose size is published. The hours
are without the download. They follow from {worker:.3f} s of a worker and {parent:.4f} s of the main process for each
million tokens, measured on {hardware} on {date}
([numbers](../bench/results/{results}.md)). Your own text needs no download.

## Evaluation

A request is one possible answer to one question. `--tasks paper --shots 0 5` scores {requests:,} requests: these, once
without examples and once with five.

{tasks}"""


def planned(size: str) -> RunConfig:
    """The run of a published size, with the largest micro-batch that fits."""
    return load_config(ROOT / f"config/{SIZES[size]}.py", ["--micro_batch=auto"])


def machine_rows() -> list[list[str]]:
    """For each size and machine: micro-batch, memory of a GPU, and hours."""
    rows = []
    for size in SIZES:
        for name in MACHINES:
            machines = parse_machines(name)
            run, world = planned_run(planned(size), machines)
            needs, rate = needs_of(run, world, machines), assumed_rate(run, machines)
            fits = needs.total <= needs.limit
            hours = run.total_steps * run.tokens_per_step / rate / 3600 if rate else 0
            cells = [str(needs.micro_batch) if fits else "none fits", gb(needs.total), gb(needs.limit), f"{hours:,.0f}"]
            rows.append([size, str(machines), *cells])
    return rows


def checkpoint_rows() -> list[list[str]]:
    """For each size: the number of checkpoints on the disk, and their bytes."""
    machines = parse_machines("8xH100")
    found = {size: needs_of(*planned_run(planned(size), machines), machines) for size in SIZES}
    return [[size, str(n.checkpoints), gb(n.disk / n.checkpoints), gb(n.disk)] for size, n in found.items()]


def preparation() -> tuple[dict, dict]:
    """The facts of PREPARED, and its row with the seconds of processor time for a million tokens."""
    facts, *rows = map(json.loads, (RESULTS / f"{PREPARED}.jsonl").read_text(encoding="utf-8").splitlines())
    return facts, next(row for row in rows if row["side"] == "processor time per million tokens")


def data_rows(parent: float, worker: float) -> list[list[str]]:
    """For each corpus: tokens, download, disk, and hours of preparation with each number of workers."""
    rows = []
    for name, (tokens, download) in CORPORA.items():
        ready = name.startswith("pretokenized")
        hours = [max(parent, worker / cores) * tokens / 1e6 / 3600 for cores in CORES]
        cells = [short_count(round(tokens)), gb(download) if download else "not known", gb(2 * tokens)]
        rows.append([f"`{name}`", *cells, *("none" if ready else f"{h:.2f}" for h in hours)])
    return rows


def page() -> str:
    """The page in markdown."""
    facts, cost = preparation()
    parent, worker = cost["parent_cpu_s"], cost["workers_cpu_s"]
    run = planned("124M")
    machine_header = ["size", "machines x GPUs", "micro-batch", "memory", "of", "hours"]
    data_header = ["of `data.prepare`", "tokens", "download", "disk", *(f"hours, {n} cores" for n in CORES)]
    return TEXT.format(
        tokens=f"{run.total_steps * run.tokens_per_step:,}",
        mfu=ASSUMED_MFU,
        machines=markdown_table(machine_header, machine_rows()),
        checkpoints=markdown_table(["size", "checkpoints", "one", "all"], checkpoint_rows()),
        data=markdown_table(data_header, data_rows(parent, worker)),
        parent=parent,
        worker=worker,
        hardware=f"{facts['threads']} cores of {facts['processor']}",
        date=facts["date"],
        results=PREPARED,
        requests=2 * sum(REQUESTS.values()),
        tasks=markdown_table(["task", "requests"], [[task, f"{n:,}"] for task, n in REQUESTS.items()]),
    )


def main(argv: list[str] | None = None) -> None:
    Parser(prog="bench.needs", description=__doc__).parse_args(argv)
    with one_line("bench.needs"):
        write_durably(ROOT / PAGE, page().encode())
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
