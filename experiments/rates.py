"""Measure how fast the gradient falls with the number of steps: python -m experiments.rates

Theory (MARS-M, arXiv 2510.21800): over T steps the mean gradient norm is of order T^(-1/3) for MARS-M with the exact
correction and gamma 1, and T^(-1/4) for Muon. Both are measured on a small problem that is not convex, with the
schedules of the theory. The exponent is the slope of a line in log-log axes. Three further arms must fail: Muon
under MARS-M's schedule, MARS-M with the gamma of practice (0.025), and MARS-M with the approximate correction.

Every arm sees the same noise. The rules that would refute the theory are in `rules`; they were fixed before the run.
If one is broken, the command names it and its exit status is 1.

    python -m experiments.rates                  the full measurement
    python -m experiments.rates --tune           the tuning of the constants at 2048 steps
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.report import Report, bench_parser, in_processes, results_folder
from optimizers import MARSM, Muon
from runtime.command import at_least, one_line
from training.plot import new_figure, save

ROWS, COLUMNS = 8, 16
NOISES = ("symmetric", "skewed")
LONGEST = 2**16  # steps of the longest run; each shorter one has half as many
SHORTEST = 2**8
FITTED = 5  # slopes use this many of the longest runs
SEEDS = 8
TUNED_AT = 2048  # steps at which the constants of the schedules were tuned, once, with other seeds
# Learning rates and values of 1 - beta that were tried. The best are 0.028 with 0.1 for Muon (mean norm 3.81) and 0.057
# with 0.0125 for MARS-M (2.92). 1 - beta stays so small that the variance of a momentum is proportional to it.
TUNING = ((0.02, 0.028, 0.04, 0.057, 0.08), (0.0125, 0.025, 0.05, 0.1))
SAMPLES = 256  # steps of a run at which norms are measured, evenly spaced
Values = dict[str, np.ndarray]  # arm -> (numbers of steps, seeds)


@dataclass(frozen=True)
class Arm:
    """An optimizer with the schedule of its theory: a constant learning rate and momentum that depend on T."""

    lr: float  # at T = TUNED_AT
    weight: float  # 1 - beta at T = TUNED_AT
    lr_power: float  # lr is proportional to T^lr_power
    weight_power: float  # and 1 - beta to T^weight_power
    gamma: float | None = None  # for MARS-M; None: Muon without Nesterov momentum
    is_approx: bool = False

    def optimizer(self, x: nn.Parameter, steps: int, seeds: int) -> tuple[Muon | MARSM, float]:
        """The optimizer, and the factor that turns its momentum into an average of gradients."""
        lr = self.lr * (steps / TUNED_AT) ** self.lr_power
        weight = self.weight * (steps / TUNED_AT) ** self.weight_power
        groups = [{"params": [x], "role": "matrix", "blocks": seeds}]  # a block of rows for each seed
        settings: dict[str, Any] = dict(lr=lr, momentum=1 - weight, weight_decay=0.0, scale="original")
        if self.gamma is None:
            return Muon(groups, **settings, nesterov=False), weight
        mars: dict[str, Any] = dict(gamma=self.gamma, is_approx=self.is_approx, clip_c=False, keep_previous=True)
        return MARSM(groups, **settings, **mars), 1.0


MUON, MARS_M = "Muon", "MARS-M exact, gamma 1"
MUON_FAST, SMALL_GAMMA = "Muon, MARS-M's schedule", "MARS-M exact, gamma 0.025"
APPROXIMATE = "MARS-M approximate, gamma 1"
mars_m = Arm(lr=0.057, weight=0.0125, lr_power=-2 / 3, weight_power=-2 / 3, gamma=1.0)
ARMS = {
    MUON: Arm(lr=0.028, weight=0.1, lr_power=-3 / 4, weight_power=-1 / 2),
    MARS_M: mars_m,
    MUON_FAST: replace(mars_m, gamma=None),
    SMALL_GAMMA: replace(mars_m, gamma=0.025),
    APPROXIMATE: replace(mars_m, is_approx=True),
}


class Problem:
    """grad F(X) = P (X - X*) Q + 0.18 sin(3 X), with eigenvalues of P and Q from 0.3 to 1, for many runs at once.

    A sample adds noise: N + 0.3 Z (X - X*), elementwise, with Z normal. N is normal (symmetric noise), or 0.3 normal
    + 3 (e - 1) D with e from the exponential distribution and D D^T = I (skewed noise). The mean of orthogonalized
    skewed gradients is not the direction of their mean, so an optimizer has to average before it orthogonalizes.
    The first `seeds` runs have symmetric noise, the last `seeds` have skewed noise.
    """

    def __init__(self, steps: int, seeds: int, stream: int = 0) -> None:
        self.seeds, self.runs = seeds, len(NOISES) * seeds
        fixed = torch.Generator().manual_seed(0)
        self.P, self.Q = (self._spectrum(n, fixed) for n in (ROWS, COLUMNS))
        self.optimum = torch.randn(ROWS, COLUMNS, generator=fixed)
        self.D = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=fixed))[0].mT
        self.random = torch.Generator().manual_seed(1_000_000 * (1 + stream) + steps)
        self.start = torch.randn(seeds, ROWS, COLUMNS, generator=self.random).repeat(len(NOISES), 1, 1)

    @staticmethod
    def _spectrum(n: int, generator: torch.Generator) -> Tensor:
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
        return basis @ torch.diag(torch.linspace(0.3, 1, n)) @ basis.mT

    def gradient(self, X: Tensor) -> Tensor:
        """The full gradient at X (runs, rows, columns)."""
        return self.P @ (X - self.optimum) @ self.Q + 0.18 * torch.sin(3 * X)

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The noise of one step after the other: N and 0.3 Z, (runs, rows, columns)."""
        while True:
            N, Z = torch.randn(2, 128, self.runs, ROWS, COLUMNS, generator=self.random)
            e = torch.empty(128, self.seeds, 1, 1).exponential_(generator=self.random)
            N[:, self.seeds :].mul_(0.3).add_(3 * (e - 1) * self.D)
            yield from zip(N, 0.3 * Z, strict=True)

    def sampled(self, full: Tensor, X: Tensor, sample: tuple[Tensor, Tensor]) -> Tensor:
        """A sample's gradient at X, given the full one."""
        return torch.addcmul(full + sample[0], sample[1], X - self.optimum)


def measure(arm: Arm, steps: int, seeds: int, stream: int = 0) -> np.ndarray:
    """Two means over the steps of a run, (2, noises, seeds).

    The first is the nuclear norm of the full gradient, the second the Frobenius norm of momentum - full gradient.
    """
    torch.set_num_threads(1)
    problem = Problem(steps, seeds, stream)
    x = nn.Parameter(problem.start.reshape(-1, COLUMNS).clone())
    X = x.detach().view_as(problem.start)
    optimizer, factor = arm.optimizer(x, steps, problem.runs)
    samples = problem.samples()
    sample, stride = next(samples), max(1, steps // SAMPLES)
    found = []
    for step in range(steps):
        full, upcoming = problem.gradient(X), next(samples)
        if optimizer.needs_lookahead:
            x.grad = problem.sampled(full, X, upcoming).view_as(x)
            optimizer.update_previous_grad()
        x.grad = problem.sampled(full, X, sample).view_as(x)
        optimizer.step()
        optimizer.update_last_grad()
        sample = upcoming
        if step % stride == stride // 2:
            error = factor * optimizer.state[x]["momentum"].view_as(full) - full
            found.append(torch.stack([torch.linalg.matrix_norm(full, "nuc"), torch.linalg.matrix_norm(error)]))
    return torch.stack(found).mean(0).view(2, len(NOISES), seeds).double().numpy()


def slope(steps: Iterable[int], values: np.ndarray) -> np.ndarray:
    """Slope of log value on log steps by least squares. values: (..., numbers of steps)."""
    x = np.log(np.asarray(list(steps), dtype=float))
    x -= x.mean()
    return np.log(values) @ x / (x @ x)


def resampled(values: np.ndarray, draws: int = 2000) -> np.ndarray:
    """Means of values (numbers of steps, seeds) over bootstrap samples of seeds: (draws, numbers of steps).

    The samples are the same for equal numbers of seeds, so differences of arms are paired.
    """
    chosen = np.random.default_rng(0).integers(values.shape[1], size=(draws, values.shape[1]))
    return values[:, chosen].mean(-1).T


def slopes_of(steps: Iterable[int], values: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope of the means over seeds, and the slopes of bootstrap samples. values: (numbers of steps, seeds)."""
    steps = list(steps)
    return float(slope(steps, values.mean(1))), slope(steps, resampled(values))


def bounds(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of bootstrap values."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


class Finding:
    """Slopes of one noise, over the FITTED longest runs, with bootstrap samples over seeds."""

    def __init__(self, steps: list[int], norms: Values, errors: Values) -> None:
        self.steps, self.norms, self.errors = steps, norms, errors
        self.norm_slopes = {arm: slopes_of(steps[-FITTED:], v[-FITTED:]) for arm, v in norms.items()}
        self.error_slopes = {arm: slopes_of(steps[-FITTED:], v[-FITTED:]) for arm, v in errors.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each arm."""
        for name, arm in ARMS.items():
            slope_, draws = self.norm_slopes[name]
            error, error_draws = self.error_slopes[name]
            last = slope(self.steps[-2:], self.norms[name][-2:].mean(1))
            row: dict[str, Any] = dict(arm=name, slope=_with_interval(slope_, draws), last_octave=f"{last:.3f}")
            row |= dict(theory={MUON: "-1/4", MARS_M: "-1/3"}.get(name, ""))
            yield row | dict(momentum_error_slope=_with_interval(error, error_draws), lr=arm.lr, weight=arm.weight)

    def difference(self, one: str, other: str) -> tuple[float, np.ndarray]:
        """Slope of the mean norm of one arm, less that of another."""
        return tuple(a - b for a, b in zip(self.norm_slopes[one], self.norm_slopes[other], strict=True))  # type: ignore

    def rules(self) -> Iterator[tuple[str, str, bool]]:
        """What theory demands, what was found, and whether the rule holds."""
        faster, muon_error = self.difference(MARS_M, MUON), self.error_slopes[MUON]
        rule = "MARS-M's slope is below Muon's by more than 0.03, with its interval"
        yield rule, _with_interval(*faster), bounds(faster[1])[1] < -0.03
        mars = self.norm_slopes[MARS_M]
        yield "the interval of MARS-M's slope reaches -0.28", _with_interval(*mars), bounds(mars[1])[0] <= -0.28
        rule = "the slope of Muon's momentum error is -0.25 within 0.02"
        yield rule, _with_interval(*muon_error), abs(muon_error[0] + 0.25) <= 0.02
        stalled = self.error_slopes[APPROXIMATE]
        rule = "the slope of the approximate form's momentum error is 0 within 0.02"
        yield rule, _with_interval(*stalled), abs(stalled[0]) <= 0.02
        for control, base in ((MUON_FAST, MUON), (SMALL_GAMMA, MARS_M)):
            worse = self.difference(control, base)
            yield f"{control}: slope above that of {base}", _with_interval(*worse), bounds(worse[1])[0] > 0


def _with_interval(value: float, draws: np.ndarray) -> str:
    low, high = bounds(draws)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def measure_all(steps: list[int], seeds: int, workers: int) -> dict[str, Finding]:
    """All arms at all numbers of steps: a finding for each noise."""
    jobs = [(name, T) for T in reversed(steps) for name in ARMS]  # the longest first
    results = {}
    for job, result in zip(jobs, in_processes(partial(_measure_job, seeds), jobs, workers), strict=True):
        results[job] = result
        print(f"{job[0]}, {job[1]} steps: mean norm {result[0].mean():.4f}", flush=True)

    def values(kind: int, noise: int) -> Values:
        return {arm: np.stack([results[arm, T][kind, noise] for T in steps]) for arm in ARMS}

    return {noise: Finding(steps, values(0, i), values(1, i)) for i, noise in enumerate(NOISES)}


def _measure_job(seeds: int, job: tuple[str, int]) -> np.ndarray:
    return measure(ARMS[job[0]], job[1], seeds)


def _tune_job(arm: Arm) -> float:
    norms = measure(arm, TUNED_AT, seeds=4, stream=1)[0].mean(-1)  # other seeds than those reported
    return float(np.exp(np.log(norms).mean()))


def tune(workers: int) -> None:
    """Print the mean norm, over both noises, for the constants of the grid."""
    for name in (MUON, MARS_M):
        arms = [replace(ARMS[name], lr=lr, weight=weight) for lr, weight in itertools.product(*TUNING)]
        for arm, norm in zip(arms, in_processes(_tune_job, arms, workers), strict=True):
            print(f"{name}: lr {arm.lr:g}, 1 - beta {arm.weight:g}: {norm:.3f}", flush=True)


def write(findings: dict[str, Finding], folder: Path, **facts: Any) -> list[str]:
    """Write tables and plot; returns the rules that are broken. facts: for the head of the file."""
    report, broken = Report("rates", folder, **facts), []
    for noise, finding in findings.items():
        for row in finding.rows():
            report.add(table=f"slopes, {noise} noise", **row)
    for noise, finding in findings.items():
        for rule, found, holds in finding.rules():
            report.add(table="rules", noise=noise, rule=rule, found=found, holds="yes" if holds else "NO")
            broken += [] if holds else [f"{noise} noise: {rule}; found {found}"]
    for noise, finding in findings.items():
        for what, means in (("nuclear norm of the gradient", finding.norms), ("momentum error", finding.errors)):
            for i, T in enumerate(finding.steps):
                row = {arm: float(values[i].mean()) for arm, values in means.items()}
                report.add(table=f"{what}, {noise} noise", steps=T, **row)
    report.table(by="table")
    plot(findings, report.path.with_suffix(".png"))
    return broken


def plot(findings: dict[str, Finding], path: Path) -> None:
    """Mean nuclear norm of the gradient against the number of steps, both logarithmic."""
    figure = new_figure(11, 5)
    for axes, (noise, finding) in zip(np.atleast_1d(figure.subplots(1, len(findings))), findings.items(), strict=True):
        steps = np.asarray(finding.steps, dtype=float)
        for name, values in finding.norms.items():
            label = f"{name}: {finding.norm_slopes[name][0]:.3f}"
            (line,) = axes.loglog(steps, values.mean(1), marker="o", markersize=3, label=label)
            if power := {MUON: -1 / 4, MARS_M: -1 / 3}.get(name):
                guide = values.mean(1)[-1] * (steps / steps[-1]) ** power
                axes.loglog(steps, guide, linestyle=":", color=line.get_color())
        axes.set(xlabel="steps T", title=f"{noise} noise; dotted: T^(-1/4) and T^(-1/3)")
        axes.set_ylabel("mean nuclear norm of the gradient")
        axes.legend(title="arm: slope", fontsize=8)
        axes.grid(alpha=0.25)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("rates", __doc__)
    parser.add_argument("--tune", action="store_true", help="print the tuning of the constants")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes of one thread")
    parser.add_argument(
        "--longest",
        type=at_least(2 * SHORTEST),
        default=LONGEST,
        help="steps of the longest run",
    )
    args = parser.parse_args(argv)
    with one_line("experiments.rates"):
        if args.tune:
            tune(args.workers)
            return
        lengths = [T for T in (args.longest >> k for k in range(30)) if T >= SHORTEST]
        steps, seeds = ([64, 96], 2) if args.smoke else (lengths[::-1], SEEDS)
        broken = write(measure_all(steps, seeds, args.workers), results_folder(args), longest=steps[-1], seeds=seeds)
    if args.smoke:
        print("a smoke run is too short to judge the rules")
    elif broken:
        sys.exit("experiments.rates: theory is refuted: " + "; ".join(broken))


if __name__ == "__main__":
    main()
