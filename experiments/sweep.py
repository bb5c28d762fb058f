"""Do the runs of an experiment and report them: python -m experiments.sweep PLAN

    python -m experiments.sweep --list                     the experiments, what they reproduce, and what is done
    python -m experiments.sweep gamma                      every run that is not finished, then table and plots
    python -m experiments.sweep gamma --scale paper --dry_run
    python -m experiments.sweep gamma --scale paper --commands > jobs.txt     a line per run, for a job array

Each arm is tried at several learning rates on the first seed of the plan. The best rate then runs on the other seeds,
and only those are reported, so the selection of the rate does not favour any arm. A seed gives all arms equal initial
weights and equal batches, so differences are taken seed by seed. The runs are ordinary run folders under runs/sweeps;
the same command continues an interrupted sweep. Runs of experiments.vision are selected by held-out images, and
reported by test images. The lowest test error of any epoch and try stands beside that, only because published tables
report it.
"""

import difflib
import itertools
import math
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.report import RESULTS, ROOT
from config.load import run_file
from eval.comparison import groups_of, measured_on
from eval.table import published
from experiments.plan import Plan, folder_name
from experiments.programs import PROGRAMS, Program
from runtime.command import Parser, at_least, one_line
from runtime.errors import UserError
from runtime.files import lock_of, read_json, write_durably, write_json
from runtime.hardware import environment
from runtime.markdown import table_of_records
from training.folder import CONFIG
from training.logger import METRICS, read_metrics
from training.plot import new_figure, save

PLANS = ROOT / "experiments/plans"
H100_FLOPS = 0.4 * 989e12  # assumed for the estimate of GPU hours: 40 % of the dense bf16 peak
# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def load_plan(name: str) -> Plan:
    """The plan in experiments/plans/NAME.py or in a file of that path. Raises UserError if it cannot be used."""
    path = Path(name) if name.endswith(".py") else PLANS / f"{name}.py"
    if not path.exists():
        raise UserError(f"{name}: no such plan; nearest: {nearest(name, plan_names())}")
    plan = run_file(path).get("plan")
    if not isinstance(plan, Plan):
        raise UserError(f"{path}: must define `plan`, an experiments.plan.Plan")
    try:
        errors = plan.errors()
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: a value has a wrong type ({error})") from None
    if errors:
        raise UserError(f"{path}: {'; '.join(errors)}")
    return plan


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are most like a wrong one; all of them if none is like it."""
    return ", ".join(map(repr, difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known))


def plan_names() -> list[str]:
    return sorted(p.stem for p in PLANS.glob("*.py") if not p.stem.startswith("_"))


def deviation(values: list[float]) -> float:
    """The standard deviation over seeds; NaN for a single one, and if a run diverged."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def interval(differences: list[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean of paired differences; NaN for a single one."""
    n = len(differences)
    return T975[min(max(n - 1, 1), len(T975)) - 1] * deviation(differences) / math.sqrt(n) if n else math.nan


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    sweep: "Sweep"
    arm: str
    lr: float
    decay: float | None  # weight decay; None: the arm's own
    seed: int

    @property
    def tried(self) -> str:
        """The learning rate, and the weight decay if the scale tries several, as text."""
        return f"{self.lr:g}" if self.decay is None else f"{self.lr:g}, decay {self.decay:g}"

    @property
    def name(self) -> str:
        decay = "" if self.decay is None else f"-decay{self.decay:g}"
        return f"{folder_name(self.arm)}-lr{self.lr:g}{decay}-seed{self.seed}"

    @property
    def path(self) -> Path:
        return ROOT / self.sweep.folder / self.name

    @cached_property
    def arguments(self) -> list[str]:
        """The arguments of the program."""
        arm, scale = self.sweep.plan.arms[self.arm], self.sweep.scale
        words = [scale.config, *scale.options.split(), *arm.options.split()]
        words += arm.more.get(self.sweep.scale_name, "").split()
        words += [f"--optim.lr={self.lr:g}", *([f"--lr_1d={self.lr * arm.lr_1d:g}"] if arm.lr_1d else [])]
        words += [] if self.decay is None else [f"--optim.weight_decay={self.decay:g}"]
        return [*words, f"--seed={self.seed}", f"--name={self.name}", f"--log.folder={self.sweep.folder}"]

    @property
    def command(self) -> list[str]:
        processes = self.sweep.scale.processes
        torchrun = ["-m", "runtime.torchrun", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *(torchrun if processes > 1 else []), *self.sweep.program.words, *self.arguments]

    @cached_property
    def config(self) -> Any:
        return self.sweep.program.configuration(self.arguments)

    def changes(self) -> dict[str, tuple]:
        """The settings that the plan has changed since the run folder was made, as key: (old, new)."""
        path = self.path / CONFIG
        before = read_json(path) if path.exists() else None
        return self.sweep.program.changed(before, self.config) if before else {}

    def evaluations(self) -> list[dict]:
        """The evaluations so far, each with the other numbers of its step."""
        path = self.path / METRICS
        found = read_metrics(path) if path.exists() else []
        steps = {r["step"]: r for r in found if "gradient_evaluations" in r}
        return [steps.get(r["step"], {}) | r for r in found if self.sweep.program.reports in r]

    @property
    def is_evaluated(self) -> bool:
        return (self.path / CONFIG).exists() and bool(self.evaluations())

    def records(self) -> list[dict]:
        """The evaluations of a finished run; empty if it is not finished."""
        found = self.evaluations()
        return found if found and self.sweep.program.is_last(found[-1], self.config) else []

    def final(self, metric: str) -> float:
        """The last value of a metric: infinite for a run that diverged, NaN for one that is not finished."""
        if (self.path / "diverged").exists():
            return math.inf
        records = self.records()
        return records[-1][metric] if records else math.nan

    @property
    def loss(self) -> float:
        """The metric that selects learning rates."""
        return self.final(self.sweep.program.selects[0])

    def train(self, devices: str) -> None:
        """Train, unless the run is finished. Raises RuntimeError if it fails; a loss that is not finite is a result.

        If another sweep does this run at the moment, wait for it. The run ends with this process, even if it is killed.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(self.path.with_name(f"{self.name}.sweep")):
            if math.isnan(self.loss):
                self._train(devices)

    def _train(self, devices: str) -> None:
        variables = os.environ | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {"OMP_NUM_THREADS": "1"})
        command = [sys.executable, str(ROOT / "experiments/tied.py"), str(os.getpid()), *self.command]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        if done.returncode and "is not finite" in done.stdout + done.stderr:
            (self.path / "diverged").touch()
        elif done.returncode:
            raise RuntimeError(f"{shlex.join(self.command)}\n{(done.stdout + done.stderr)[-2000:]}")
        elif math.isnan(self.loss):  # stopped by a signal, or its records are lost
            raise RuntimeError(f"{shlex.join(self.command)}\nended, and {METRICS} has no last evaluation")


def reason(output: str) -> str:
    """The line in the output of a failed run that says why: the program's own message, or else the last with words."""
    lines = [line for line in output.splitlines() if re.search("[a-z]", line)]
    messages = [line for line in lines if re.match(r"(train_gpt|config|bench\.vision): ", line)]
    return (messages or lines or ["no output"])[-1]


class Sweep:
    """A plan at one scale."""

    root = "runs/sweeps"  # folder of the run folders

    def __init__(self, name: str, scale: str = "", arms: Sequence[str] = (), reference: str = "") -> None:
        self.name, self.plan = Path(name).stem, load_plan(name)
        for option, given in (("arms", arms), ("reference", [reference] if reference else [])):
            if unknown := sorted(set(given) - self.plan.arms.keys()):
                raise UserError(f"--{option}={unknown[0]}: no such arm; nearest: {nearest(unknown[0], self.plan.arms)}")
        self.file = f"sweep_{self.name}_{scale or next(iter(self.plan.scales))}"  # name of the results, without suffix
        if reference and reference != self.plan.reference:
            self.plan = replace(self.plan, reference=reference)
            self.file += f"_vs_{folder_name(reference)}"
        if arms:
            self.file += f"_only_{'_'.join(map(folder_name, sorted(set(arms))))}"
            wanted = {name: a for name, a in self.plan.arms.items() if name in (self.plan.reference, *arms)}
            self.plan = replace(self.plan, arms=wanted)
        self.failed: dict[str, str] = {}  # runs that ended with an error, and the error
        self.scale_name = scale = scale or next(iter(self.plan.scales))
        if scale not in self.plan.scales:
            raise UserError(f"--scale={scale}: {name} has {', '.join(self.plan.scales)}")
        self.scale = self.plan.scales[scale]
        self.program: Program = PROGRAMS[self.scale.program]
        self.folder = f"{self.root}/{self.name}-{scale}"

    def changed_run(self) -> str:
        """One line about a run folder that was made with other settings than the plan's; empty if there is none."""
        for arm in self.plan.arms:
            for first, seed in itertools.product(self.tuning(arm), self.scale.seeds):
                run = replace(first, seed=seed)
                if changes := run.changes():
                    old_and_new = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
                    return (
                        f"{self.folder}/{run.name}: the plan has changed since this run was made ({old_and_new}); "
                        f"rename {self.folder}, or give the plan another name"
                    )
        return self.measured_differently()

    def measured_differently(self) -> str:
        """One line about runs that were evaluated on other validation data than others; empty if there are none."""
        runs = [
            replace(run, seed=seed) for arm in self.plan.arms for run in self.tuning(arm) for seed in self.scale.seeds
        ]
        found = {run: (read_json(run.path / CONFIG), run.evaluations()[-1]) for run in runs if run.is_evaluated}
        groups = groups_of(list(found), list(found.values()))
        if len(groups) < 2:
            return ""
        a, b = groups[0][0], groups[1][0]
        before, now = measured_on(*found[a]), measured_on(*found[b])
        keys = ", ".join(f"{k}: {before.get(k)} and {now.get(k)}" for k in now if before.get(k) != now[k])
        problem = f"{a.name} and {b.name} were evaluated on different validation data ({keys or 'not known'})"
        return f"{self.folder}: {problem}; rename the folder of one of the runs, and the same command repeats it"

    def rates(self, arm: str) -> list[float]:
        return [float(f"{self.plan.arms[arm].lr[self.scale_name] * m:.3g}") for m in self.scale.multiples]

    def tuning(self, arm: str) -> list[Run]:
        """The runs that select the learning rate of an arm, and its weight decay if the scale tries several."""
        tries = itertools.product(self.rates(arm), self.scale.decays or (None,))
        return [Run(self, arm, lr, decay, self.scale.seeds[0]) for lr, decay in tries]

    def reported(self, arm: str) -> list[Run]:
        """The runs of an arm that are reported; empty until its learning rate is selected."""
        values = {run: [run.final(metric) for metric in self.program.selects] for run in self.tuning(arm)}
        if any(math.isnan(first) for first, *_ in values.values()):
            return []
        best = min(values, key=values.__getitem__)
        return [replace(best, seed=seed) for seed in self.scale.seeds[1:]]

    def todo(self) -> list[Run]:
        """The runs that are not finished and can start now."""
        runs = [run for arm in self.plan.arms for run in (*self.tuning(arm), *self.reported(arm))]
        return [run for run in runs if math.isnan(run.loss) and run.name not in self.failed]

    def count(self) -> int:
        """Number of runs in all."""
        tries = len(self.scale.multiples) * max(len(self.scale.decays), 1)
        return len(self.plan.arms) * (tries + len(self.scale.seeds) - 1)

    def gpu_hours(self) -> float:
        """Hours of one H100 for all runs, at the assumed speed; NaN if the program gives no number of operations."""
        flops = statistics.fmean(self.program.flops(self.tuning(arm)[0].config) for arm in self.plan.arms)
        return flops * self.count() / H100_FLOPS / 3600

    def train(self, workers: int | None = None) -> None:
        """Do all runs, `workers` at a time; by default one on each GPU, or two on a CPU. More share the GPUs.

        If a run fails, its error is kept in `failed`, and the others go on.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
        gpus, size = names[: torch.cuda.device_count()], self.scale.processes
        groups = [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]
        workers = workers or len(groups) or 2
        free: queue.Queue[str] = queue.Queue()
        for devices in itertools.islice(itertools.cycle(groups or [""]), workers):
            free.put(devices)

        def train(run: Run) -> None:
            devices = free.get()
            try:
                run.train(devices)
                tqdm.write(f"{run.name}  {run.loss:.4f}")
            except RuntimeError as error:
                self.failed[run.name] = str(error)
                tqdm.write(f"{run.name}  failed: {reason(str(error))}")
            finally:
                bar.update()
                free.put(devices)

        for arm in self.plan.arms:  # an arm with wrong settings shows before the others have trained
            _ = [run.config for run in self.tuning(arm)]
        with tqdm(total=self.count(), initial=self.count() - len(self.todo()), unit="run", disable=None) as bar:
            while runs := self.todo():  # first all learning rates, then the other seeds of the best
                with ThreadPoolExecutor(workers) as pool:
                    for _ in pool.map(train, runs):
                        pass


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """A row for each finished arm: best rate, mean and spread over seeds, paired difference to the reference."""
    plan, metric, rows = sweep.plan, sweep.program.reports, []
    reported = {arm: sweep.reported(arm) for arm in plan.arms}
    finals = {arm: [run.final(metric) for run in runs] for arm, runs in reported.items()}
    points = {p["arm"]: p for p in published_points(sweep) if "arm" in p}
    for arm, losses in finals.items():
        if not losses or any(map(math.isnan, losses)):
            continue
        best, tuning = reported[arm][0], sweep.tuning(arm)
        rates, decays = sweep.rates(arm), sweep.scale.decays
        pairs = [a - b for a, b in zip(losses, finals[plan.reference], strict=False)]
        row = dict(
            arm=arm,
            best_lr=best.lr,
            tried={run.tried: round(run.loss, 4) for run in tuning},
            seeds=len(losses),
            losses=losses,
            loss=statistics.fmean(losses),
            deviation=deviation(losses),
            difference=statistics.fmean(pairs) if pairs else math.nan,
            interval=interval(pairs),
            at_edge=best.lr in (min(rates), max(rates)),
        )
        if best.decay is not None:
            row |= dict(best_decay=best.decay, decay_at_edge=best.decay in (min(decays), max(decays)))
        if metric not in sweep.program.selects:
            every = (record for run in (*tuning, *reported[arm]) for record in run.evaluations())
            row["lowest"] = min((record[metric] for record in every), default=math.inf)
        if points:
            row["published"] = points.get(arm, {}).get(metric, math.nan)
        rows.append(row)
    return sorted(rows, key=lambda row: row["loss"])


def table(sweep: Sweep, rows: Iterable[dict[str, Any]]) -> str:
    """The rows in markdown."""
    reference, program = sweep.plan.reference, sweep.program

    def text(value: float, sign: str = "") -> str:
        return format(value, f"{sign}.{program.decimals}f") if math.isfinite(value) else "not known"

    def cells(row: dict[str, Any]) -> dict[str, str]:
        diverged = row["losses"].count(math.inf)
        tries = {tried: text(x) if x < math.inf else "diverged" for tried, x in row["tried"].items()}
        out = {"arm": row["arm"]}
        edge = {True: " (edge of the grid)", False: ""}
        out["best lr"] = f"{row['best_lr']:g}{edge[row['at_edge']]}"
        out |= {"best decay": f"{row['best_decay']:g}{edge[row['decay_at_edge']]}"} if "best_decay" in row else {}
        out[program.label] = f"diverged on {diverged} of {row['seeds']} seeds" if diverged else text(row["loss"])
        out["deviation over seeds"] = text(row["deviation"])
        difference = f"{text(row['difference'], '+')} ± {text(row['interval'])}"
        out[f"difference to {reference}"] = "reference" if row["arm"] == reference else difference
        out |= {"lowest of any epoch and try": text(row["lowest"])} if "lowest" in row else {}
        out |= {"published": text(row["published"])} if "published" in row else {}
        return out | {f"tries ({program.selects[0]})": ", ".join(map(": ".join, tries.items()))}

    return table_of_records([cells(row) for row in rows])


def published_points(sweep: Sweep) -> list[dict[str, Any]]:
    """Published results of this experiment at this scale, each with its setting, learning rate, gamma or arm."""
    return [p for p in published()["sweeps"] if (p["plan"], p["scale"]) == (sweep.name, sweep.scale_name)]


def plots(sweep: Sweep, rows: list[dict[str, Any]]) -> Any:
    """The metric against data, time, gradient evaluations, learning rate and gamma; published values are stars."""
    program = sweep.program
    figure = new_figure(16, 8.5)
    (by_amount, by_time, by_gradients), (by_lr, by_gamma, legend) = figure.subplots(2, 3)
    means_over_runs = {program.amount: by_amount, "train_s": by_time, "gradient_evaluations": by_gradients}
    for number, row in enumerate(rows):
        style = dict(color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3], label=row["arm"])
        curves = [records for run in sweep.reported(row["arm"]) if (records := run.records())]
        means = [statistics.mean(r[program.reports] for r in group) for group in zip(*curves, strict=False)]
        for key, axes in means_over_runs.items():
            places = [statistics.fmean(r.get(key, math.nan) for r in group) for group in zip(*curves, strict=False)]
            axes.plot(places, means, **style)
        rates = sweep.rates(row["arm"])
        lowest = [min(run.loss for run in sweep.tuning(row["arm"]) if run.lr == lr) for lr in rates]
        by_lr.plot(rates, lowest, marker="o", **style)
        gamma = sweep.plan.arms[row["arm"]].gamma
        if gamma is not None:
            by_gamma.errorbar(gamma, row["loss"], row["deviation"], fmt="o", color=style["color"], label=row["arm"])
    for point in published_points(sweep):
        for axes, key in ((by_lr, "lr"), (by_gamma, "gamma")):
            if key in point:
                axes.plot(point[key], point[program.reports], "k*", markersize=10)
    by_gamma.set_visible(by_gamma.has_data())
    finite = [x for row in rows for x in (row["loss"], *row["tried"].values()) if x < math.inf]
    bottom = min(finite, default=0.0) - 0.06 * program.height
    labels = (program.amount, "training time with compilation, seconds", "gradient evaluations", "learning rate")
    for axes, label in zip((*means_over_runs.values(), by_lr), labels, strict=True):
        axes.set(xlabel=label, ylabel=program.label, ylim=(bottom, bottom + program.height))
        axes.grid(alpha=0.25)
    by_lr.set(xscale="log", ylabel=program.selects[0])
    by_gamma.set(xlabel="gamma", ylabel=f"{program.label}, deviation over seeds")
    legend.axis("off")
    legend.legend(*by_amount.get_legend_handles_labels(), loc="center", fontsize=8)
    return figure


def report(sweep: Sweep, folder: Path) -> None:
    """Print the table and write it with the plots and all numbers."""
    rows = rows_of(sweep)
    if problem := sweep.measured_differently():  # the data may have changed during the sweep
        raise UserError(problem)
    if not rows:
        raise UserError(f"{sweep.name} at the {sweep.scale_name} scale: no arm is finished")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device, sweep.scale.processes)
    facts = {key: facts[key] for key in ("commit", "packages", "device")}
    missing = [arm for arm in sweep.plan.arms if arm not in {row["arm"] for row in rows}]
    text = f"# {sweep.plan.question}\n\n{sweep.plan.source}; {sweep.scale_name} scale: "
    text += f"`{sweep.scale.config} {sweep.scale.options}`\n\n{table(sweep, rows)}"
    text += f"\nNot finished: {', '.join(missing)}\n" if missing else ""
    if points := published_points(sweep):
        results = "; ".join(f"{p['setting']}: {p[sweep.program.reports]}" for p in points)
        text += f"\nPublished: {results} ({points[0]['source']})\n"
    folder.mkdir(parents=True, exist_ok=True)
    device_and_torch = f"{facts['device']}, torch {facts['packages'].get('torch')}"
    with lock_of(folder / sweep.file):  # another sweep of this plan may report, too
        write_durably(folder / f"{sweep.file}.md", f"{text}\n{device_and_torch}\n".encode())
        write_json(folder / f"{sweep.file}.json", facts | dict(rows=rows))
        save(plots(sweep, rows), folder / f"{sweep.file}.png")
    print(f"{text}\nwritten to {folder / sweep.file}.md, .json and .png")


def overview() -> str:
    """The experiments as a markdown table."""
    rows = []
    for name in plan_names():
        plan = load_plan(name)
        for scale in plan.scales:
            sweep = Sweep(name, scale)
            done, hours = len(rows_of(sweep)), sweep.gpu_hours() if scale.startswith("paper") else math.nan
            state = f"{done} of {len(plan.arms)} arms" if done else "no"
            state = "runs of another plan" if sweep.changed_run() else state
            file = RESULTS / f"{sweep.file}.json"
            results = f"{len(read_json(file)['rows'])} of {len(plan.arms)} arms" if file.exists() else "no"
            row = dict(plan=f"{name}, {scale}", reproduces=plan.source, question=plan.question, runs=sweep.count())
            row |= {"H100 hours, estimated": "" if math.isnan(hours) else f"{hours:,.0f}"}
            rows.append(row | {"in bench/results": results, "finished here": state})
    return table_of_records(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="experiments.sweep", description=__doc__)
    parser.add_argument("plan", nargs="?", help="name of a file in experiments/plans, or a path")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--scale", default="", help="scale of the plan (default: its first one)")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these arms and the reference")
    parser.add_argument("--reference", default="", metavar="ARM", help="compare with this arm (default: the plan's)")
    parser.add_argument("--workers", type=at_least(1), help="runs at a time (default: one per GPU, or 2 on a CPU)")
    parser.add_argument("--dry_run", action="store_true", help="as --commands, with the estimated GPU hours")
    parser.add_argument("--commands", action="store_true", help="print a command for each run that can start now")
    parser.add_argument("--report_only", action="store_true", help="report the finished arms without training")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of results; default: bench/results")
    args = parser.parse_args(argv)
    with one_line("experiments.sweep", "interrupted; the same command continues"):
        if args.list or not args.plan:
            print(overview(), end="")
            return
        sweep = Sweep(args.plan, args.scale, args.arms, args.reference)
        if problem := sweep.changed_run():
            raise UserError(problem)
        if args.dry_run or args.commands:
            print("\n".join(shlex.join(run.command) for run in sweep.todo()))
            if args.dry_run:
                hours = sweep.gpu_hours()
                about = f", about {hours:,.{0 if hours >= 10 else 4}f} hours of an H100 at 40 % of its peak"
                print(f"{sweep.count()} runs{'' if math.isnan(hours) else about}")
            return
        if not args.report_only:
            sweep.train(args.workers)
        if sweep.failed:
            by_reason = {reason(error): error for error in sweep.failed.values()}
            print("\n".join(["", "runs that failed, one of each kind:", *by_reason.values(), ""]), file=sys.stderr)
        report(sweep, args.folder)
        if sweep.failed:
            raise UserError(f"{len(sweep.failed)} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()
