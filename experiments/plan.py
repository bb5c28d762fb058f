"""The form of an experiment for `python -m experiments.sweep`; the experiments are in experiments/plans/."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: an optimizer with its settings."""

    options: str  # options of the program that trains
    lr: dict[str, float]  # by scale, the middle of the learning rates that are tried
    more: dict[str, str] = field(default_factory=dict)  # by scale, further options
    lr_1d: float | None = None  # MARS: learning rate of vectors as a multiple of lr
    gamma: float | None = None  # x value in the plot of loss against gamma


@dataclass(frozen=True)
class Scale:
    """How large the runs are."""

    config: str  # first argument of the program: a config file, or the images of experiments.vision
    options: str  # options of the program, equal for all arms
    seeds: tuple[int, ...]  # the first one selects learning rates; the others are reported
    processes: int = 1  # per run; each needs a GPU
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0)  # learning rates that each arm tries, as multiples of its own
    decays: tuple[float, ...] = ()  # weight decays that each arm tries with each rate; empty: the arm's own
    program: str = "train_gpt"  # "train_gpt" for train_gpt.py, or "vision" for experiments.vision


@dataclass(frozen=True)
class Plan:
    """An experiment. Each arm tries the same multiples of its learning rate."""

    question: str
    source: str  # what it reproduces
    arms: dict[str, Arm]
    reference: str  # the arm that the others are compared with, seed by seed
    scales: dict[str, Scale]

    def errors(self) -> list[str]:
        """Everything wrong with this plan, one line each."""
        out = []
        if self.reference not in self.arms:
            out.append(f"reference={self.reference!r}: must be one of the arms, {', '.join(self.arms)}")
        names: dict[str, str] = {}
        for arm in self.arms:
            if (other := names.setdefault(folder_name(arm), arm)) != arm:
                out.append(f"arms {other!r} and {arm!r}: would use the same run folders; use other letters or digits")
        for name, scale in self.scales.items():
            if len(set(scale.multiples)) < 2:
                out.append(f"scale {name}: tries a single learning rate; give at least two multiples")
            if len(set(scale.decays)) == 1:
                out.append(f"scale {name}: tries a single weight decay; write it into the options")
            if scale.program not in ("train_gpt", "vision"):
                out.append(f"scale {name}: program={scale.program!r}: must be 'train_gpt' or 'vision'")
            if scale.program == "vision" and scale.processes > 1:
                out.append(f"scale {name}: processes={scale.processes}: experiments.vision uses one process")
            for key in ("seeds", "multiples", "decays"):
                if len(set(values := getattr(scale, key))) < len(values):
                    out.append(f"scale {name}: {key}={values}: gives a value twice")
            if len(set(scale.seeds)) < 2:
                out.append(f"scale {name}: give at least two seeds; the first selects, and the others are reported")
            out += [f"arm {arm!r}: has no lr for scale {name}" for arm, a in self.arms.items() if name not in a.lr]
        return out


def folder_name(arm: str) -> str:
    """The name of an arm in the names of its run folders."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", arm)
