"""What all benches share: options, result files in bench/results/, and timing in turns."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from runtime.command import Parser
from runtime.files import lock_of, write_durably
from runtime.markdown import cell, table_of_records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"


def bench_parser(name: str, doc: str) -> Parser:
    """A parser with the options that every bench has."""
    parser = Parser(prog=f"bench.{name}", description=doc)
    parser.add_argument("--smoke", action="store_true", help="a quick test with tiny sizes on the CPU")
    parser.add_argument("--folder", type=Path, help="folder of results; default: bench/results, smoke: a temporary one")
    return parser


def results_folder(args: argparse.Namespace) -> Path:
    """The folder of results that the options of bench_parser choose."""
    return args.folder or (Path(tempfile.mkdtemp()) if args.smoke else RESULTS)


class Report:
    """The rows of one bench run. FOLDER/NAME_HARDWARE_DATE.jsonl is written again after each change.

    more: facts that the first line of the file gives beside hardware, versions and date.
    """

    def __init__(self, name: str, folder: Path = RESULTS, device: str = "cpu", **more: object) -> None:
        import torch  # not at the top, because the worker processes of data.prepare do not need it

        hardware = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
        if "NULL_GPU_COUNT" in os.environ:  # the stand-in of tests/null_gpu has the name of a real GPU
            hardware = "null GPU"
        date = time.strftime("%Y-%m-%d")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}_{hardware.replace(' ', '-')}_{date}.jsonl"
        self.rows: list[dict] = []
        facts = dict(bench=name, hardware=hardware, processor=_processor(), torch=torch.__version__)
        self.facts = json.dumps(facts | dict(threads=torch.get_num_threads(), date=date) | more)

    def add(self, **row: object) -> None:
        """Print and write a row."""
        self.begin(**row)
        self.show()

    def begin(self, **row: object) -> None:
        """Write a row that `update` completes and `show` prints."""
        self.rows.append(row)
        self.update()

    def update(self, **numbers: object) -> None:
        """Add numbers to the last row, and write the file, which replaces that of an earlier run of this day.

        If two runs write at once, the file holds the rows of the last one that wrote, and not a mixture.
        """
        if self.rows:
            self.rows[-1].update(numbers)
        self._write(self.path, "".join(f"{line}\n" for line in (self.facts, *map(json.dumps, self.rows))))

    def show(self) -> None:
        """Print the last row."""
        print("  ".join(f"{key} {cell(value)}" for key, value in self.rows[-1].items()), flush=True)

    def table(self, by: str | None = None) -> None:
        """Print all rows as markdown and write them next to the JSON lines.

        by: a key of the rows; each of its values gets its own table.
        """
        groups: dict[object, list[dict]] = {}
        for row in self.rows:
            groups.setdefault(row.get(by), []).append(row)
        text = "\n".join(map(table_of_records, groups.values()))
        self._write(self.path.with_suffix(".md"), f"{self.facts}\n\n{text}")
        print(f"\n{text}\nwritten to {self.path} and .md")

    def _write(self, path: Path, text: str) -> None:
        with lock_of(self.path):
            write_durably(path, text.encode())


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function. All take turns, so that other load on the machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    """The results of function(job) for each job, in order. One worker: in this process."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # a forked process cannot use a GPU
        yield from pool.map(function, jobs)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
