"""Tables of benchmark scores: our checkpoints below published rows."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.tasks import PAPER, factor, metrics_of
from runtime.markdown import markdown_table

Column = tuple[str, str]  # a column: task and metric

SIZES = {"small": 124e6, "medium": 354e6, "large": 774e6, "xl": 1558e6}  # parameters of the published models


@cache
def published() -> dict:
    """Published losses and scores with their sources: eval/published.json."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def size_of(parameters: int) -> str | None:
    """The published size within a tenth of a parameter count, or None."""
    return next((name for name, n in SIZES.items() if abs(parameters - n) < 0.1 * n), None)


def score_rows(scores: list[dict], sizes: Sequence[str]) -> tuple[list[Column], list[dict]]:
    """The columns, each a task and a metric, and the rows of a table: name, shots, mean, cells and cut requests.

    cells: column to score and standard error or None. cut: task to the requests that lost tokens, and all requests.
    scores: records of results.json. Published rows of the sizes come first, if a record has the same shots.
    """
    names = {s["task"] for s in scores}
    tasks = [t for t in PAPER if t in names] + list(dict.fromkeys(s["task"] for s in scores if s["task"] not in PAPER))
    complete, shots = names >= PAPER.keys(), {s["shots"] for s in scores}
    rows = []
    for p in published()["downstream"]:  # a row without single scores has only a mean
        if p["size"] in sizes and p["shots"] in shots and (complete or names & p["scores"].keys()):
            cells = {(t, PAPER[t][1]): (score, None) for t, score in p["scores"].items()}
            name = f"published: {p['method']} {p['size']}, {p['data']}"
            rows.append({"name": name, "shots": p["shots"], "cells": cells, "mean": p.get("mean"), "cut": {}})
    ours: dict[tuple, dict[str, Any]] = {}
    for s in scores:
        name = s["checkpoint"] + (f", first {s['limit']} documents" if s.get("limit") else "")
        key = (name, s.get("sha256"), s["shots"])  # a run has one name and other weights at every step
        empty: dict[str, Any] = {"name": name, "shots": s["shots"], "cells": {}, "step": s.get("step"), "cut": {}}
        row = ours.setdefault(key, empty)
        row["cells"] |= {(s["task"], metric): cell for metric, cell in cells_of(s).items()}
        if s.get("requests_cut_on_the_left"):
            row["cut"][s["task"]] = (s["requests_cut_on_the_left"], s["requests"])
    uses = Counter((row["name"], row["shots"]) for row in ours.values())
    for row in ours.values():
        if uses[row["name"], row["shots"]] > 1:
            row["name"] += f", step {row['step']}"
    rows += ours.values()
    paper = [(t, PAPER[t][1]) for t in PAPER]
    for row in rows:
        if row.get("mean") is None:
            row["mean"] = fmean(row["cells"][p][0] for p in paper) if row["cells"].keys() >= set(paper) else None
    columns = dict.fromkeys((t, metric) for t in tasks for s in scores if s["task"] == t for metric in cells_of(s))
    return list(columns), sorted(rows, key=lambda r: r["shots"])


def cells_of(score: dict) -> dict[str, tuple[float, float | None]]:
    """The scores of a record by metric, in the unit of the tables, each with its standard error or None."""
    found, cells = score.get("all_metrics", {}), {}
    for metric in metrics_of(score["task"], score["metric"], found):
        chosen = metric == score["metric"]
        value = score["score"] if chosen else found[f"{metric},none"]
        error = score["stderr"] if chosen else found.get(f"{metric}_stderr,none")
        unit = factor(metric)
        cells[metric] = (unit * value, None if error is None else unit * error)
    return cells


def markdown(scores: list[dict], sizes: Sequence[str]) -> str:
    """A markdown table of scores in percent with their standard errors, and notes on rows and cut requests."""
    columns, rows = score_rows(scores, sizes)
    header = ["model", "shots", *(f"{PAPER[t][0] if t in PAPER else t} {metric}" for t, metric in columns), "mean of 9"]
    lines = []
    for row in rows:
        texts = [row["name"], str(row["shots"])]
        for score, error in [*(row["cells"].get(c, (None, None)) for c in columns), (row["mean"], None)]:
            text = "" if score is None else f"{score:.2f}"
            texts.append(text if error is None else f"{text} +- {error:.2f}")
        lines.append(texts)
    below = [*cut_notes(rows), *notes(scores, sizes)]
    return markdown_table(header, lines) + "".join(f"{line}\n" for line in below)


def cut_notes(rows: list[dict]) -> list[str]:
    """Lines below a table: requests that were longer than the context and lost their first tokens."""
    lines = []
    for row in rows:
        if row["cut"]:
            counts = ", ".join(f"{task} {cut} of {requests}" for task, (cut, requests) in row["cut"].items())
            lines.append(f"- {row['name']}, {row['shots']}-shot: {counts}")
    return ["", "Requests longer than the context, without their first tokens:", "", *lines] if lines else []


def notes(scores: list[dict], sizes: Sequence[str]) -> list[str]:
    """Lines below a table: the source of the published rows, and the scores that were not published."""
    if not sizes:
        return []
    out = ["", f"Published: {published()['sources']['downstream']}."]
    for shots in sorted({s["shots"] for s in scores}):
        for size in sizes:
            rows = [p for p in published()["downstream"] if (p["size"], p["shots"]) == (size, shots)]
            if not rows:
                out.append(f"No published {shots}-shot scores of size {size} are known here.")
            elif only_mean := [p["method"] for p in rows if not p["scores"]]:
                out.append(f"Of {', '.join(only_mean)} ({size}, {shots}-shot) only the mean is known here.")
    return out


def comma_separated(scores: list[dict], sizes: Sequence[str]) -> str:
    """The same table as CSV, with a column for each score and each standard error."""
    columns, rows = score_rows(scores, sizes)
    names = [t if t not in [u for u, _ in columns[:i]] else f"{t}_{m}" for i, (t, m) in enumerate(columns)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "shots", *(f"{name}{end}" for name in names for end in ("", "_stderr")), "mean"])
    for row in rows:
        cells = [v for c in columns for v in row["cells"].get(c, (None, None))]
        numbers = ["" if v is None else f"{v:.4f}" for v in [*cells, row["mean"]]]
        writer.writerow([row["name"], row["shots"], *numbers])
    return out.getvalue()
