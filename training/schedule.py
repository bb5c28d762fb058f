"""Schedules: the learning rate of every step, and other hyperparameters that change during a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from optimizers.options import errors_of, option
from optimizers.settings import Settings
from runtime.command import parse_number
from runtime.errors import UserError

# A shape maps `progress` in [0, 1] to a factor in [0, 1]: 1 is the peak learning rate, 0 the final one. `decay` is the
# setting wsd_decay. A new schedule is one more line.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, decay: 0.5 * (1 + math.cos(math.pi * progress)),
    "wsd": lambda progress, decay: min(1.0, (1 - progress) / decay),  # constant, then linear
    "linear": lambda progress, decay: 1 - progress,
    "exponential": lambda progress, decay: 0.9 ** (100 * progress),  # as in the official MARS code
    "constant": lambda progress, decay: 1.0,
}


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a shape from the peak learning rate down to min_lr."""

    shape: str = option("cosine", f"one of {', '.join(SHAPES)}; wsd is constant, then decays linearly")
    warmup: int = option(2000, "steps of linear warm-up", least=0)
    min_lr: float | None = option(None, "final learning rate; none: min_lr_ratio times the peak", least=0)
    min_lr_ratio: float = option(0.1, "final learning rate relative to the peak, if min_lr is none", least=0, most=1)
    wsd_decay: float = option(0.2, "wsd: fraction of the run, at its end, with linear decay", above=0, most=1)
    zero_first: bool = option(False, "start the warm-up at 0 instead of lr / warmup (as published)")
    moves: str = option("", 'settings that change linearly to a final value, or with lr: "gamma:0.05,weight_decay:lr"')

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        out = errors_of(self)
        if self.shape not in SHAPES:
            out.append(f"shape={self.shape!r}: must be one of {', '.join(SHAPES)}")
        try:
            parse_moves(self.moves)
        except ValueError as error:
            out.append(f"moves={self.moves!r}: {error}")
        return out


Moves = dict[str, float | None]  # final values by name; None: proportional to the learning rate


def parse_moves(text: str) -> Moves:
    """The text "gamma:0.05,weight_decay:lr" as a dict, with None for "lr". Raises UserError for other text."""
    out: Moves = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition(":")
        try:
            out[name.strip()] = None if value.strip() == "lr" else float(parse_number(value.strip()))
        except ValueError:
            raise UserError('must be names and final values or lr, for example "gamma:0.05,weight_decay:lr"') from None
    return out


def learning_rate(config: ScheduleConfig, step: int, steps: int, peak: float) -> float:
    """Learning rate of update number `step` (from 0) in a run of `steps` updates."""
    if step < config.warmup:
        return peak * (step if config.zero_first else step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    low = peak * config.min_lr_ratio if config.min_lr is None else config.min_lr
    return low + SHAPES[config.shape](progress, config.wsd_decay) * (peak - low)


def budget_problem(state: dict, schedule: ScheduleConfig, peak: float, steps: int, continues: bool) -> str | None:
    """Why a budget of `steps` steps cannot continue a checkpoint; None if it can.

    state: the checkpoint's state.json. peak: the learning rate that `schedule` scales. continues: the run
    itself goes on; another run that begins there may have another learning rate.
    """
    step, before, saved = state["step"], state["steps"], state["config"]["schedule"]
    if step > steps:
        return f"a budget of {steps} steps is smaller than the {step} that are done"
    old = ScheduleConfig(**{key: saved[key] for key in vars(schedule).keys() & saved.keys()})
    then, now = learning_rate(old, step, before, peak), learning_rate(schedule, step, steps, peak)
    if not continues or step == steps == before or math.isclose(then, now, rel_tol=1e-6):
        return None
    return (
        f"the learning rate would jump at step {step} from {then:.3g} to {now:.3g}, because the budget of {before} "
        f"steps becomes {steps}; begin another run before the decay with --branch_from=RUN@STEP, or give "
        "--accept_changes"
    )


def moved(start: float, end: float, step: int, steps: int) -> float:
    """A hyperparameter that changes linearly from start to end, at update number `step` (from 0) of `steps`.

    After the last update it stays at the end.
    """
    progress = min(1.0, step / max(1, steps - 1))
    return end + (1 - progress) * (start - end) if progress else start


def set_rates(
    optimizer: Optimizer, optim: Settings, schedule: ScheduleConfig, moves: Moves, step: int, steps: int
) -> float:
    """Set the learning rate and the moving hyperparameters of every group; returns the main learning rate.

    If a group has its own value, its ratio to the main value is kept.
    """
    lr = learning_rate(schedule, step, steps, optim.lr)
    relative = lr / optim.lr if optim.lr else 0.0
    for group in optimizer.param_groups:
        initial = group.setdefault("initial_lr", group["lr"])
        group["lr"] = initial * relative
        for key, end in moves.items():
            start, initial = getattr(optim, key), group.setdefault(f"initial_{key}", group[key])
            now = start * relative if end is None else moved(start, end, step, steps)
            group[key] = now if initial == start else initial * (now / start if start else 0.0)
    return lr
