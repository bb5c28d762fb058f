"""How every bench keeps its results: JSON lines as it goes, a table at the end, both in bench/results/."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


class Report:
    """Rows of one bench run, written to bench/results/NAME_HARDWARE_DATE.jsonl as they come."""

    def __init__(self, name: str, device: torch.device, folder: Path | None = None) -> None:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
        stem = f"{name}_{hardware.replace(' ', '-')}_{time.strftime('%Y-%m-%d')}"
        folder = folder or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stem}.jsonl"
        self.rows: list[dict] = []
        facts = dict(bench=name, hardware=hardware, processor=_processor(device), torch=torch.__version__)
        facts |= dict(threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"))
        self.path.write_text(json.dumps(facts) + "\n")

    def add(self, **row: object) -> None:
        """Keep a row, print it, and write it down at once."""
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def table(self, by: str | None = None) -> None:
        """Print all rows as a markdown table and write it beside the JSON lines.

        by: a key of the rows; there is a table for each of its values.
        """
        groups: dict[object, list[dict]] = {}
        for row in self.rows:
            groups.setdefault(row.get(by), []).append(row)
        text = "\n\n".join(markdown(rows) for rows in groups.values())
        self.path.with_suffix(".md").write_text(f"{self.path.read_text().splitlines()[0]}\n\n{text}\n")
        print(f"\n{text}\n\nwritten to {self.path} and .md")


def markdown(rows: list[dict]) -> str:
    """Rows as a markdown table; a key that a row lacks is an empty cell."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = ["" if row.get(k) is None else row[k] for k in keys]
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def interleaved(sides: dict[str, Callable[[], None]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each side, all sides taking turns so that a noisy machine is noisy for all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
