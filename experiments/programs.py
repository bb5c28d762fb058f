"""The programs whose runs experiments.sweep compares: what it must know about each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.report import ROOT
from config.load import load_config, to_dict
from experiments import vision
from model import GPT
from training.folder import differences
from training.run_config import RunConfig, changeable_keys, default_values


@dataclass(frozen=True)
class Program:
    """A program that trains, and how to read its run folders. Of the metrics, lower values are better."""

    words: tuple[str, ...]  # after `python`
    configuration: Callable[[Sequence[str]], Any]  # the configuration for these arguments; it has `optim`
    changed: Callable[[dict, Any], dict[str, tuple]]  # settings by which a config.json differs from a configuration
    is_last: Callable[[dict, Any], bool]  # whether a record is the last one of a run
    flops: Callable[[Any], float]  # operations of a whole run; NaN if not known
    selects: tuple[str, ...]  # the metric that selects learning rates, and further metrics for ties
    reports: str  # metric of the report
    label: str  # name of that metric in the report
    amount: str  # key of the amount of training data in a record
    decimals: int  # decimals of that metric in tables
    height: float  # range of the y axis of the plots


def _of_gpt(arguments: Sequence[str]) -> RunConfig:
    return load_config(ROOT / arguments[0], arguments[1:])


def _changed_gpt(before: dict, config: RunConfig) -> dict[str, tuple]:
    changed = differences(before, to_dict(config), default_values(config))
    return {key: values for key, values in changed.items() if key not in changeable_keys(config)}


def _flops_of_gpt(config: RunConfig) -> float:
    """The exact form of MARS takes two gradients a step."""
    with torch.device("meta"):
        flops = GPT(config.model).flops_per_token() * config.tokens_per_step * config.total_steps
    return flops * (1 if getattr(config.optim, "is_approx", True) else 2)


PROGRAMS = {
    "train_gpt": Program(
        words=("train_gpt.py",),
        configuration=_of_gpt,
        changed=_changed_gpt,
        is_last=lambda record, config: record["step"] == config.total_steps,
        flops=_flops_of_gpt,
        selects=("val_loss",),
        reports="val_loss",
        label="validation loss",
        amount="tokens",
        decimals=4,
        height=0.85,
    ),
    "vision": Program(
        words=("-m", "experiments.vision"),
        configuration=lambda arguments: vision.parse(arguments)[0],
        changed=vision.changed,
        is_last=vision.is_last,
        flops=lambda config: math.nan,
        selects=("val_error", "val_loss"),
        reports="test_error",
        label="test error in %",
        amount="images",
        decimals=2,
        height=25.0,
    ),
}
