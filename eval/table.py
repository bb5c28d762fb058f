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

from eval.tasks import PAPER, factor

SIZES = {"small": 124e6, "medium": 354e6, "large": 774e6, "xl": 1558e6}  # parameters of the published models


@cache
def published() -> dict:
    """Published losses and scores with their sources: eval/published.json."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def size_of(parameters: int) -> str | None:
    """The published size within a tenth of a parameter count, or None."""
    return next((name for name, n in SIZES.items() if abs(parameters - n) < 0.1 * n), None)


def score_rows(scores: list[dict], sizes: Sequence[str]) -> tuple[list[str], list[dict]]:
    """The tasks, and the rows of a table: name, shots, mean, and cells (task to score and standard error or None).

    scores: records of results.json. Published rows of the sizes come first, if a record has the same shots.
    """
    names = {s["task"] for s in scores}
    tasks = [t for t in PAPER if t in names] + list(dict.fromkeys(s["task"] for s in scores if s["task"] not in PAPER))
    complete, shots = names >= PAPER.keys(), {s["shots"] for s in scores}
    rows = []
    for p in published()["downstream"]:  # a row without single scores has only a mean
        if p["size"] in sizes and p["shots"] in shots and (complete or names & p["scores"].keys()):
            cells = {t: (score, None) for t, score in p["scores"].items()}
            name = f"published: {p['method']} {p['size']}, {p['data']}"
            rows.append({"name": name, "shots": p["shots"], "cells": cells, "mean": p.get("mean")})
    ours: dict[tuple, dict[str, Any]] = {}
    for s in scores:
        name = s["checkpoint"] + (f", first {s['limit']} documents" if s.get("limit") else "")
        key = (name, s.get("sha256"), s["shots"])  # a run has one name and other weights at every step
        row = ours.setdefault(key, {"name": name, "shots": s["shots"], "cells": {}, "step": s.get("step")})
        unit = factor(s["metric"])
        row["cells"][s["task"]] = (unit * s["score"], None if s["stderr"] is None else unit * s["stderr"])
    uses = Counter((row["name"], row["shots"]) for row in ours.values())
    for row in ours.values():
        if uses[row["name"], row["shots"]] > 1:
            row["name"] += f", step {row['step']}"
    rows += ours.values()
    for row in rows:
        if row.get("mean") is None:
            row["mean"] = fmean(row["cells"][t][0] for t in PAPER) if row["cells"].keys() >= PAPER.keys() else None
    return tasks, sorted(rows, key=lambda r: r["shots"])


def markdown(scores: list[dict], sizes: Sequence[str]) -> str:
    """A markdown table of scores in percent with their standard errors, and notes on the published rows."""
    tasks, rows = score_rows(scores, sizes)
    metrics = {s["task"]: s["metric"] for s in scores}
    header = ["model", "shots", *(f"{PAPER[t][0] if t in PAPER else t} {metrics[t]}" for t in tasks), "mean of 9"]
    lines = []
    for row in rows:
        texts = [row["name"], str(row["shots"])]
        for score, error in [*(row["cells"].get(t, (None, None)) for t in tasks), (row["mean"], None)]:
            text = "" if score is None else f"{score:.2f}"
            texts.append(text if error is None else f"{text} +- {error:.2f}")
        lines.append(texts)
    return markdown_table(header, lines) + "".join(f"{line}\n" for line in notes(scores, sizes))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown. The first column is left-aligned, the others are right-aligned."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in [header, *rows]]
    return "".join([lines[0], "|---|" + "---:|" * (len(header) - 1) + "\n", *lines[1:]])


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
    tasks, rows = score_rows(scores, sizes)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "shots", *(f"{t}{end}" for t in tasks for end in ("", "_stderr")), "mean"])
    for row in rows:
        cells = [v for t in tasks for v in row["cells"].get(t, (None, None))]
        numbers = ["" if v is None else f"{v:.4f}" for v in [*cells, row["mean"]]]
        writer.writerow([row["name"], row["shots"], *numbers])
    return out.getvalue()
