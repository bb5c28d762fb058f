"""Schedules: a learning rate for every step, and any other number that moves during a run."""

import math
from dataclasses import dataclass

SHAPES = ("cosine", "wsd", "linear", "exponential", "constant")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then one of five shapes from the peak learning rate down to min_lr."""

    shape: str = "cosine"  # "cosine", "wsd" (hold, then linear), "linear", "exponential" or "constant"
    warmup: int = 2000  # steps of linear warm-up
    min_lr: float | None = None  # learning rate at the end; none: min_lr_ratio of the peak; other groups in proportion
    min_lr_ratio: float = 0.1  # where min_lr is none
    wsd_decay: float = 0.2  # "wsd": last share of the run, spent decaying
    zero_first: bool = False  # start the warm-up at 0 instead of lr / warmup (as published)

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        out = []
        if self.shape not in SHAPES:
            out.append(f'shape="{self.shape}": must be one of {", ".join(SHAPES)}')
        if self.warmup < 0:
            out.append(f"warmup={self.warmup}: must not be negative")
        if not 0 <= (self.min_lr or 0.0) < math.inf:
            out.append(f"min_lr={self.min_lr}: must be a number >= 0")
        if not 0 <= self.min_lr_ratio <= 1:
            out.append(f"min_lr_ratio={self.min_lr_ratio}: must be in [0, 1]")
        if not 0 < self.wsd_decay <= 1:
            out.append(f"wsd_decay={self.wsd_decay}: must be in (0, 1]")
        return out


def interpolate(shape: str, progress: float, start: float, end: float, wsd_decay: float = 0.2) -> float:
    """The value at `progress` in [0, 1] of a curve from start to end.

    "exponential" is the MARS code's: end + 0.9^(100 progress) (start - end).
    """
    if shape == "wsd":
        remaining = min(1.0, (1 - progress) / wsd_decay)
    else:
        remaining = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "exponential": 0.9 ** (100 * progress),
            "constant": 1.0,
        }[shape]
    return end + remaining * (start - end)


def learning_rate(config: ScheduleConfig, step: int, steps: int, peak: float) -> float:
    """Learning rate of update number `step` (from 0) in a run of `steps` updates."""
    if step < config.warmup:
        return peak * (step if config.zero_first else step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    low = peak * config.min_lr_ratio if config.min_lr is None else config.min_lr
    return interpolate(config.shape, progress, peak, low, config.wsd_decay)
