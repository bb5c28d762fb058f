"""Which gamma fits a run: python -m experiments.gradient_noise RUN

At every kept checkpoint of a run, this program trains on for some steps. It compares the momentum of each gamma with
the full gradient F, which it estimates from many batches that the run has not seen. It reports, over all weight
matrices together:

    noise      s2 = E|g - F|^2 for the gradient g of one step's batch, relative to |F|^2
    A          E|m - F|^2 / s2 for the average m of gradients without correction (gamma 0)
    formula    gamma = (A - (1 - beta)) / (A - 2 (1 - beta) + 1), which minimises the error below; 0 if A < 1 - beta
    lowest     the gamma that minimises E|m_gamma - F|^2, approximate and exact form

with m_gamma = (1 - gamma) m + gamma g in the approximate form, and m + gamma X in the exact form, where X averages the
difference of a batch's gradients at the present and the previous weights. Products with F use estimates from other
batches, so they are unbiased. Gradients are not clipped. The program holds about eight more copies of the weights.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import Report, bench_parser, results_folder
from bench.runs import batch_of, opened, run_arguments
from config.load import saved_config
from runtime.command import at_least, one_line
from runtime.errors import UserError
from train_gpt import Trainer, train
from training.average import weights_in_model
from training.plot import new_figure, save

GAMMAS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
Gradients = list[Tensor]  # one tensor for each weight matrix


def dot(a: Gradients, b: Gradients) -> float:
    """Inner product over all matrices."""
    return float(sum(torch.dot(x.flatten(), y.flatten()).double() for x, y in zip(a, b, strict=True)))


def combined(*parts: tuple[float, Gradients]) -> Gradients:
    """The sum of gradients with factors."""
    out = torch._foreach_mul(parts[0][1], parts[0][0])
    for factor, gradients in parts[1:]:
        torch._foreach_add_(out, gradients, alpha=factor)
    return list(out)


def best_gamma(a: float, beta: float) -> float:
    """The gamma in [0, 1] with the smallest error of the momentum; see the top of this file."""
    return min(1.0, max(0.0, (a - (1 - beta)) / (a - 2 * (1 - beta) + 1)))


def lowest(errors: tuple[float, float, float]) -> float:
    """Where the parabola through values at 0, 1/2 and 1 is lowest within [0, 1]."""
    at_0, at_half, at_1 = errors
    curvature, slope = 2 * (at_0 - 2 * at_half + at_1), 4 * at_half - 3 * at_0 - at_1
    if curvature <= 0:
        return 0.0 if at_0 <= at_1 else 1.0
    return min(1.0, max(0.0, -slope / (2 * curvature)))


class Follower:
    """Trains on from a checkpoint, and keeps the averages that give the momentum of every gamma."""

    def __init__(self, t: Trainer, beta: float) -> None:
        self.t, self.beta, self.count = t, beta, 0
        roles = t.model.parameter_roles()
        self.matrices = [p for name, p in t.model.named_parameters() if roles[name] == "matrix"]
        self.average = [torch.zeros_like(p) for p in self.matrices]  # average of the gradients
        self.change = [torch.zeros_like(p) for p in self.matrices]  # X of the exact form
        self.ahead: Gradients | None = None  # the coming batch's gradient at the previous weights
        self.previous = {name: p.detach().clone() for name, p in t.model.named_parameters()}

    def gradient(self, step: int) -> Gradients:
        """Gradient of a step's batch at the present weights."""
        self.t.accumulate(batch_of(self.t, step), step)
        gradients = [p.grad.clone() for p in self.matrices if p.grad is not None]
        self.t.optimizer.zero_grad(set_to_none=True)
        return gradients

    def step(self) -> None:
        """Take a training step and update the averages with its gradient."""
        t, beta = self.t, self.beta
        ahead = self.gradient(t.step + 1)
        batch = t.next_batch()
        t.set_rates()
        t.gradients(batch)
        now = [p.grad for p in self.matrices if p.grad is not None]
        torch._foreach_lerp_(self.average, now, 1 - beta)
        torch._foreach_mul_(self.change, beta)
        if self.ahead is not None:
            torch._foreach_add_(self.change, combined((1.0, now), (-1.0, self.ahead)), alpha=beta)
        self.count += 1
        torch._foreach_copy_(list(self.previous.values()), list(t.model.parameters()))
        t.update()
        self.ahead = ahead

    def momentum(self, gamma: float, g: Gradients, change: Gradients | None) -> Gradients:
        """The momentum after a step with the gradient g: approximate, or exact with g's change by the last step."""
        beta = self.beta
        average = combined((1 / (1 - beta**self.count), self.average))  # as if it had started long ago
        if change is None:
            return combined(((1 - gamma) * beta, average), (1 - beta + gamma * beta, g))
        return combined((beta, average), (1 - beta, g), (gamma * beta, self.change), (gamma * beta, change))


@dataclass
class Measurement:
    """What was found at one step. Errors E|m_gamma - F|^2 are by form and gamma."""

    step: int
    signal: float  # |F|^2
    noise: float  # s2
    a: float
    errors: dict[str, dict[float, float]]


def measure(f: Follower, draws: int) -> Measurement:
    """Compare the momentum with F at the present weights. draws: batches for each of three estimates."""
    first, second = f.t.step + 1, f.t.step + 1 + draws
    halves = [combined(*((1 / draws, f.gradient(s + i)) for i in range(draws))) for s in (first, second)]
    full = combined((0.5, halves[0]), (0.5, halves[1]))
    forms = ("approximate", "exact")
    errors = {form: dict.fromkeys(GAMMAS, 0.0) for form in forms}
    noise = 0.0
    for step in range(second + draws, second + 2 * draws):
        g = f.gradient(step)
        with weights_in_model(f.t.model, f.previous):
            before = f.gradient(step)
        noise += dot(combined((1.0, g), (-1.0, full)), combined((1.0, g), (-1.0, full))) / draws
        for form in forms:
            change = combined((1.0, g), (-1.0, before)) if form == "exact" else None
            for gamma in errors[form]:
                m = f.momentum(gamma, g, change)
                difference = [combined((1.0, m), (-1.0, half)) for half in halves]
                errors[form][gamma] += dot(*difference) / draws
    noise /= 1 + 1 / (2 * draws)  # E|g - full|^2 contains the noise of the estimate of F
    signal = dot(*halves)
    return Measurement(f.t.step, signal, noise, errors["approximate"][0.0] / noise, errors)


def row(found: list[Measurement], beta: float) -> dict[str, Any]:
    """The means over the measurements near one checkpoint, with standard errors."""

    def cell(values: list[float]) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.mean(values):.3g} ± {error:.2g}"

    out: dict[str, Any] = dict(step=found[0].step, noise=cell([m.noise / m.signal for m in found]))
    out |= {"A": cell([m.a for m in found]), "gamma by formula": cell([best_gamma(m.a, beta) for m in found])}
    for form in found[0].errors:
        lows = [lowest((m.errors[form][0.0], m.errors[form][0.5], m.errors[form][1.0])) for m in found]
        out[f"lowest error, {form}"] = cell(lows)
    return out


def kept_steps(folder: Path, wanted: str) -> list[int]:
    """The steps of the checkpoints to measure: all, or the wanted ones ("1000,2000"). UserError if one is missing."""
    kept = sorted(int(p.name[5:]) for p in folder.glob("checkpoints/step_*"))
    if not kept:
        raise UserError(f"{folder}: has no checkpoint; give the folder of a run")
    names = [str(step) for step in kept]
    chosen = wanted.split(",") if wanted else names
    if missing := [name for name in chosen if name not in names]:
        raise UserError(f"--checkpoints={wanted}: {folder} has not kept {missing[0]}; it has {', '.join(names)}")
    return [int(name) for name in chosen]


def measurements(folder: Path, step: int, follow: int, points: int, draws: int) -> tuple[list[Measurement], float]:
    """Measurements after `follow` steps from a checkpoint and at later points, and the run's beta."""
    run = saved_config(folder)
    beta = getattr(run.optim, "momentum", None) or getattr(run.optim, "betas", (0.95,))[0]
    log = replace(run.log, wandb="off", tensorboard=False)
    with tempfile.TemporaryDirectory() as temporary:
        log = replace(log, folder=temporary)
        with opened(replace(run, branch_from=f"{folder}@{step}", init_from="", log=log)) as t:
            follower, found = Follower(t, beta), []
            try:
                for point in range(points):
                    for _ in range(follow if point == 0 else math.ceil(1 / (1 - beta))):
                        follower.step()
                    found.append(measure(follower, draws))
            finally:
                t.batches.close()
    return found, beta


def plot(found: dict[int, list[Measurement]], path: Path) -> None:
    """Error of the momentum against gamma, relative to gamma 0, a colour for each checkpoint."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for number, (step, points) in enumerate(found.items()):
        for form, line in (("approximate", "-"), ("exact", "--")):
            values = [statistics.mean(m.errors[form][g] for m in points) for g in GAMMAS]
            relative = [value / values[0] for value in values]
            axes.plot(GAMMAS, relative, line, color=f"C{number % 10}", marker=".", label=f"step {step}, {form}")
    axes.set(xlabel="gamma", ylabel="squared error of the momentum, relative to gamma 0", yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.25)
    save(figure, path)


def smoke_run(folder: Path) -> Path:
    """Train a tiny run with two checkpoints."""
    settings = ("steps=12", "checkpoint.every=6", "optimizer=muon", "log.every=6")
    with opened(run_arguments(folder, "124M", True, *settings)) as t:
        train(t)
    return folder / "runs/run"


def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("gradient_noise", __doc__ or "")
    parser.add_argument("run", nargs="?", help="folder of a run")
    parser.add_argument("--checkpoints", default="", help="steps, with commas; default: all that the run has kept")
    parser.add_argument(
        "--follow", type=at_least(1), default=100, help="steps from a checkpoint to its first measurement"
    )
    parser.add_argument("--points", type=at_least(1), default=4, help="measurements near each checkpoint")
    parser.add_argument(
        "--draws", type=at_least(1), default=32, help="batches for each of three estimates of a measurement"
    )
    args = parser.parse_args(argv)
    memory = "the measurement keeps about eight copies of the weights; use --device=cpu, or measure a smaller model"
    with one_line("experiments.gradient_noise", memory=memory), tempfile.TemporaryDirectory() as temporary:
        if not args.run and not args.smoke:
            raise UserError("RUN: give the folder of a run")
        folder = smoke_run(Path(temporary)) if args.smoke else Path(args.run)
        follow, points, draws = (3, 2, 2) if args.smoke else (args.follow, args.points, args.draws)
        found: dict[int, list[Measurement]] = {}
        steps = kept_steps(folder, args.checkpoints)
        report = Report("gradient_noise", results_folder(args), "cuda" if torch.cuda.is_available() else "cpu")
        for step in steps:
            found[step], beta = measurements(folder, step, follow, points, draws)
            report.add(run=folder.name, **row(found[step], beta))
        report.table()
        plot(found, report.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
