"""What a GPU does during some work, from a trace of torch's profiler."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def trace_of(work: Callable[[], object], path: Path) -> list[dict]:
    """The GPU events of work(). The whole trace is written to `path` in Chrome's format."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return gpu_events(path)


def gpu_events(path: Path) -> list[dict]:
    """The kernels, copies and fills of a trace: dicts with "cat", "name", "ts" and "dur" (microseconds).

    Named ranges are left out, because they include idle time.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in kinds]


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
