"""Measure how the best learning rate changes with the width of the model: python -m experiments.width

Does the runs of a plan whose scales are named by their widths: every arm, learning rate and seed at every width.
The best rate of a seed is where a parabola through the best tried rate and its neighbours is lowest, in the logarithm
of the rate. The slope is that of a least-squares line through log rate against log width, with one point for each width
and seed: -1 means that twice the width needs half the rate. The same command continues interrupted runs.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.report import RESULTS, Report
from experiments.sweep import T975, Run, Sweep, load_plan
from runtime.command import Parser, at_least, one_line
from runtime.errors import UserError
from training.plot import new_figure, save

Point = tuple[int, float]  # width, best learning rate of a seed


class Grid(Sweep):
    """The runs of one width: every learning rate on every seed."""

    def runs(self, arm: str) -> list[Run]:
        return [replace(run, seed=seed) for run in self.tuning(arm) for seed in self.scale.seeds]

    def todo(self) -> list[Run]:
        runs = (run for arm in self.plan.arms for run in self.runs(arm))
        return [run for run in runs if math.isnan(run.loss) and run.name not in self.failed]

    def count(self) -> int:
        return sum(len(self.runs(arm)) for arm in self.plan.arms)

    def losses(self, arm: str) -> dict[int, list[float]]:
        """The losses of each seed, in the order of the rates; empty if a run is not finished."""
        found = {seed: [run.loss for run in self.runs(arm) if run.seed == seed] for seed in self.scale.seeds}
        return {} if any(map(math.isnan, itertools.chain(*found.values()))) else found


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which a parabola through the lowest loss and its neighbours is lowest, in log rate.

    The lowest tried rate itself if it is the first or the last one, or if a neighbour diverged.
    """
    i = min(range(len(losses)), key=losses.__getitem__)
    if i in (0, len(losses) - 1) or math.isinf(losses[i - 1] + losses[i + 1]):
        return rates[i]
    left, right = losses[i - 1] - losses[i], losses[i + 1] - losses[i]
    return rates[i] * math.sqrt(rates[i + 1] / rates[i - 1]) ** ((left - right) / (2 * (left + right)))


def slope(points: Sequence[Point]) -> tuple[float, float]:
    """The slope of log rate on log width by least squares, and half the width of its 95 % interval."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    found, intercept = statistics.linear_regression(x, y)
    left = sum((b - found * a - intercept) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    return found, T975[min(len(x) - 2, len(T975)) - 1] * math.sqrt(left / (statistics.pvariance(x) * len(x)))


def row_of(grids: dict[int, Grid], arm: str) -> dict[str, Any]:
    """Best rates, their slope, and the loss that keeping the rate of the narrowest model costs at each width."""
    row: dict[str, Any] = {"arm": arm}
    points: list[Point] = []
    cost, kept = {}, 0
    for width, grid in grids.items():
        rates, losses = grid.rates(arm), grid.losses(arm)
        means = [statistics.fmean(values) for values in zip(*losses.values(), strict=True)]
        lowest = means.index(min(means))
        kept = kept if points else lowest
        found = [(width, best_rate(rates, values)) for values in losses.values()]
        points += found
        edge = " (edge of the grid)" if lowest in (0, len(rates) - 1) else ""
        row[f"best lr, width {width}"] = " / ".join(f"{rate:.2g}" for _, rate in found) + edge
        cost[f"lost with the lr of {next(iter(grids))}, width {width}"] = f"{means[kept] - means[lowest]:.4f}"
        row[f"loss, width {width}"] = f"{means[lowest]:.4f}"
    found_slope, half = slope(points)
    return row | {"slope": f"{found_slope:.2f} ± {half:.2f}"} | dict(itertools.islice(cost.items(), 1, None))


def plot(grids: dict[int, Grid], arms: Sequence[str], path: Path) -> None:
    """Mean loss against learning rate, a picture for each arm and a line for each width."""
    figure = new_figure(4.2 * min(3, len(arms)), 3.6 * math.ceil(len(arms) / 3))
    every = figure.subplots(math.ceil(len(arms) / 3), min(3, len(arms)), squeeze=False, sharey=True).flat
    for axes, arm in zip(every, arms, strict=False):
        for width, grid in grids.items():
            means = [statistics.fmean(values) for values in zip(*grid.losses(arm).values(), strict=True)]
            axes.plot(grid.rates(arm), means, marker="o", markersize=3, label=f"width {width}")
        axes.set(xscale="log", title=arm, xlabel="learning rate", ylabel="validation loss")
        axes.grid(alpha=0.25)
    every[0].legend(fontsize=8)
    save(figure, path)


def report(grids: dict[int, Grid], folder: Path) -> None:
    """Write table, numbers and plot of the arms that are finished at every width."""
    arms = [arm for arm in grids[min(grids)].plan.arms if all(grid.losses(arm) for grid in grids.values())]
    if not arms:
        raise UserError("no arm is finished at every width")
    first = grids[min(grids)]
    out = Report("width", folder, config=first.scale.config, options=first.scale.options, widths=list(grids))
    for arm in arms:
        out.begin(table="best rates", **row_of(grids, arm))
    for arm, (width, grid) in itertools.product(arms, grids.items()):
        for seed, losses in grid.losses(arm).items():
            tries = {f"{rate:g}": round(loss, 4) for rate, loss in zip(grid.rates(arm), losses, strict=True)}
            out.begin(table=arm, width=width, seed=seed, **tries)
    out.table(by="table")
    plot(grids, arms, out.path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="experiments.width", description=__doc__)
    parser.add_argument("plan", nargs="?", default="width", help="name of a file in experiments/plans, or a path")
    parser.add_argument("--widths", nargs="+", default=[], metavar="WIDTH", help="only these widths; at least two")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these arms of the plan")
    parser.add_argument("--workers", type=at_least(1), help="runs at a time (default: one per GPU, or 2 on a CPU)")
    parser.add_argument("--report_only", action="store_true", help="report the finished arms without training")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of results; default: bench/results")
    args = parser.parse_args(argv)
    with one_line("experiments.width", "interrupted; the same command continues"):
        widths = sorted(map(int, args.widths or load_plan(args.plan).scales))
        grids = {w: Grid(args.plan, str(w), args.arms, args.arms[0] if args.arms else "") for w in widths}
        for grid in grids.values():
            if problem := grid.changed_run():
                raise UserError(problem)
            if not args.report_only:
                grid.train(args.workers)
            if grid.failed:
                raise UserError(f"a run failed: {next(iter(grid.failed.values()))}")
        report(grids, args.folder)


if __name__ == "__main__":
    main()
