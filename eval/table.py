"""Tables of benchmark scores: checkpoints, and published rows beside them."""

import csv
import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from eval.tasks import PAPER

SIZES = {"small": 124e6, "medium": 354e6, "large": 774e6, "xl": 1558e6}  # parameters of the published models


@lru_cache(maxsize=1)
def published() -> dict:
    """Published losses and scores with their sources: eval/published.json."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def size_of(parameters: int) -> str | None:
    """The published size within a tenth of a parameter count, or None."""
    return next((name for name, n in SIZES.items() if abs(parameters - n) < 0.1 * n), None)


def score_rows(scores: list[dict], sizes: Sequence[str]) -> tuple[list[str], list[dict]]:
    """Column names and rows (name, shots, mean, cells: task to (percent, standard error or None)) of records.

    Published rows of the sizes come first, where they have the shots of some record.
    """
    tasks = [t for t in PAPER if any(s["task"] == t for s in scores)]
    whole = len(tasks) == len(PAPER)
    tasks += list(dict.fromkeys(s["task"] for s in scores if s["task"] not in PAPER))
    shots = {s["shots"] for s in scores}
    rows = []
    for p in published()["downstream"]:
        if p["size"] in sizes and p["shots"] in shots and (whole or any(t in p["scores"] for t in tasks)):
            cells = {t: (score, None) for t, score in p["scores"].items()}
            name = f"published: {p['method']} {p['size']}, {p['data']}"
            rows.append({"name": name, "shots": p["shots"], "cells": cells, "mean": p.get("mean")})
    ours = {}
    for s in scores:
        name = s["checkpoint"] + (f", first {s['limit']} documents" if s.get("limit") else "")
        one = (name, s.get("sha256"), s["shots"])  # a run's name outlives its weights
        row = ours.setdefault(one, {"name": name, "shots": s["shots"], "cells": {}, "step": s.get("step")})
        row["cells"][s["task"]] = (100 * s["score"], None if s["stderr"] is None else 100 * s["stderr"])
    for name, _, shots in ours:
        same = [row for (n, _, k), row in ours.items() if (n, k) == (name, shots)]
        for row in same if len(same) > 1 else []:
            row["name"] = f"{name}, step {row['step']}"
    rows += ours.values()
    for row in rows:
        row["mean"] = row.get("mean") or mean_of(row["cells"])
    return tasks, sorted(rows, key=lambda r: r["shots"])


def mean_of(cells: dict) -> float | None:
    """The plain mean over the papers' nine tasks; None unless all are there."""
    if not all(t in cells for t in PAPER):
        return None
    return sum(cells[t][0] for t in PAPER) / len(PAPER)


def markdown(scores: list[dict], sizes: Sequence[str]) -> str:
    """Scores in percent, with a standard error where there is one, as a markdown table, and what is not in it."""
    tasks, rows = score_rows(scores, sizes)
    metrics = {s["task"]: s["metric"] for s in scores}
    header = ["model", "shots", *(f"{PAPER[t][0] if t in PAPER else t} {metrics[t]}" for t in tasks), "mean of 9"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        texts = [row["name"], str(row["shots"])]
        for task in tasks:
            score, error = row["cells"].get(task, (None, None))
            text = "" if score is None else f"{score:.2f}"
            texts.append(text + (f" +- {error:.2f}" if error is not None else ""))
        mean = row["mean"]
        lines.append("| " + " | ".join([*texts, "" if mean is None else f"{mean:.2f}"]) + " |")
    return "\n".join([*lines, *notes(scores, sizes)]) + "\n"


def notes(scores: list[dict], sizes: Sequence[str]) -> list[str]:
    """Where the published rows come from, and which are not known here."""
    known = {(p["size"], p["shots"]): [] for p in published()["downstream"]}
    for p in published()["downstream"]:
        known[p["size"], p["shots"]].append(p)
    wanted = [(size, shots) for shots in sorted({s["shots"] for s in scores}) for size in sizes]
    out = [f"Published: {published()['sources']['downstream']}."] if any(w in known for w in wanted) else []
    for size, shots in wanted:
        if (size, shots) not in known:
            out.append(f"No published {shots}-shot scores of size {size} are known here.")
        elif partial := [p["method"] for p in known[size, shots] if not p["scores"]]:
            out.append(f"Of {', '.join(partial)} ({size}, {shots}-shot) only the mean is known here.")
    return ["", *out] if out else []


def comma_separated(scores: list[dict], sizes: Sequence[str]) -> str:
    """The same table as CSV, a column for each score and each standard error."""
    tasks, rows = score_rows(scores, sizes)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "shots", *(f"{t}{end}" for t in tasks for end in ("", "_stderr")), "mean"])
    for row in rows:
        cells = [v for t in tasks for v in row["cells"].get(t, (None, None))]
        numbers = ["" if v is None else f"{v:.4f}" for v in [*cells, row["mean"]]]
        writer.writerow([row["name"], row["shots"], *numbers])
    return out.getvalue()
