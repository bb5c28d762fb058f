"""What a GPU does in a piece of work, read from one trace of torch's profiler."""

import json
from collections.abc import Callable
from pathlib import Path

import torch


def trace_of(work: Callable[[], None], path: Path) -> list[dict]:
    """What the GPU does in a piece of work: events with "cat", "name", "ts" and "dur" (microseconds).

    path: where the whole trace is written, in Chrome's format.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return gpu_events(path)


def gpu_events(path: Path) -> list[dict]:
    """The kernels, copies and fills in a trace; ranges that somebody named, which span idle time, are left out."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in kinds]


def idle_share(events: list[dict]) -> float:
    """Share of the time from the first to the last event in which none is under way."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def by_kernel(events: list[dict], least: float = 0.01) -> dict[str, float]:
    """Names of what takes at least this share of the busy time, and its share, largest first."""
    total, sums = sum(e["dur"] for e in events), {}
    for e in events:
        sums[e["name"]] = sums.get(e["name"], 0.0) + e["dur"] / total
    return dict(sorted(((n, x) for n, x in sums.items() if x >= least), key=lambda pair: -pair[1]))
