"""The configuration of a run: sections declared by the rooms that read them, assembled and checked together here."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from data.loader import DataConfig
from model import GPTConfig
from optimizers import Settings
from optimizers.options import errors_of, option, options_of
from runtime.checkpoint import CheckpointConfig
from runtime.compute import ComputeConfig
from runtime.logger import LogConfig
from runtime.schedule import ScheduleConfig, parse_moves

ALTERNATIVES = (("batch_size", "batch_tokens"), ("steps", "tokens"))  # two ways to say one thing
MOST_STEPS = 2**31  # of a run; sequences are counted in 64 bits
MOST_TOKENS = 2**31  # of a step; a batch and its order are held in memory


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Batch and budget are stated once, independent of the machine."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: Settings | None = None  # settings of the chosen optimizer, filled in by the loader
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    size: str = option("", "name of the model size; empty: the config file's name", on_resume="free")
    name: str = option("", "run folder; empty: size, optimizer, dataset, budget and overrides", on_resume="free")
    optimizer: str = option("mars_m", "which optimizer to use")
    seed: int = option(1, "random seed for initial weights, data order and dropout", least=0, most=2**62 - 1)

    batch_size: int | None = option(480, "sequences per step, over all processes", least=1)
    batch_tokens: int | None = option(None, "tokens per step, instead of batch_size", least=1)
    steps: int | None = option(None, "budget in steps", least=1)
    tokens: int | None = option(None, "budget in tokens, instead of steps; the last step is rounded up", least=1)
    micro_batch: int | None = option(
        None,
        "sequences per process and pass, at most; the largest that divides is used. auto: as many as fit",
        least=1,
        on_resume="free",
    )
    grad_multiple: int = option(
        1, "gradients are this many times the mean: 4 or 12 sum over micro-batches as published", least=1
    )
    grad_clip: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0)

    device: str = option("auto", "auto, cpu, cuda or cuda:N", on_resume="free")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "bfloat16 uses autocast; auto: bfloat16 on a GPU that has it", on_resume="free"
    )
    compile: Literal["auto", "true", "false"] = option(
        "auto", "compile model and optimizer; auto: on a GPU", on_resume="free"
    )
    eval_every: int = option(
        1000, "steps between evaluations; the last step is always evaluated", least=1, on_resume="free"
    )

    def errors(self) -> list[str]:
        """Everything wrong with this run, one line each; sections first."""
        parts = {name: getattr(self, name) for name in SECTIONS}
        out = [f"{name}.{error}" for name, part in parts.items() if part is not None for error in part.errors()]
        out += errors_of(self)
        for pair in ALTERNATIVES:
            given = {key: getattr(self, key) for key in pair if getattr(self, key) is not None}
            if len(given) != 1:
                said = " and ".join(f"{k}={v}" for k, v in given.items()) or "neither"
                out.append(f"{pair[0]} or {pair[1]}: give exactly one ({said} given)")
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable():
            out.append(f"name={self.name!a}: must be a plain folder name; the folder around it is log.folder")
        return out or self._combination_errors()

    def _combination_errors(self) -> list[str]:
        """What is wrong between settings that are each allowed."""
        out = []
        if self.batch_tokens and self.batch_tokens % self.model.block_size:
            out.append(f"batch_tokens={self.batch_tokens}: must be a multiple of block_size={self.model.block_size}")
        if self.optim is not None and (self.schedule.min_lr or 0.0) > self.optim.lr:
            out.append(f"schedule.min_lr={self.schedule.min_lr}: is above optim.lr={self.optim.lr}, the peak")
        for key in parse_moves(self.schedule.moves):
            if self.optim is not None and not isinstance(self.optim.as_group().get(key), float):
                numbers = [k for k, v in self.optim.as_group().items() if isinstance(v, float)]
                out.append(f'schedule.moves: {self.optimizer} has no number "{key}"; it has {", ".join(numbers)}')
        if not out and self.total_steps > MOST_STEPS:
            out.append(f"a run of {self.total_steps:,} steps: is above 2^31; lower steps or tokens")
        if not out and self.tokens_per_step > MOST_TOKENS:
            size = f"{self.sequences:,} sequences x {self.model.block_size:,}"
            out.append(f"a step of {size} tokens: is above 2^31 tokens; lower batch_size, batch_tokens or block_size")
        if not out and self.schedule.warmup > self.total_steps:
            out.append(f"schedule.warmup={self.schedule.warmup}: is longer than the run of {self.total_steps} steps")
        return out

    @property
    def sequences(self) -> int:
        """Sequences per step over all processes."""
        return self.batch_size if self.batch_size is not None else (self.batch_tokens or 0) // self.model.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.model.block_size

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.tokens_per_step)

    @property
    def moves(self) -> dict[str, float]:
        """Hyperparameters of the optimizer that move linearly over the run, with their final values."""
        moving = self.optim.moving() if self.optim is not None else {}
        return moving | parse_moves(self.schedule.moves)

    def share(self, world_size: int) -> int:
        """Sequences per step of one process. Raises ValueError, naming what divides, for a batch that does not."""
        if self.sequences % world_size == 0:
            return self.sequences // world_size
        advice = [f"{w} processes" for w in _nearest_divisors(world_size, self.sequences)]
        advice += [f"--batch_size={world_size * k}" for k in _neighbours(self.sequences // world_size)]
        raise ValueError(
            f"a batch of {self.sequences} sequences does not divide into {world_size} processes; "
            f"nearest that do: {', '.join(advice)}"
        )


# sections and the classes that declare them; the section of the optimizer follows from its name
SECTIONS: dict[str, type | None] = dict(model=GPTConfig, data=DataConfig, optim=None, schedule=ScheduleConfig)
SECTIONS |= dict(compute=ComputeConfig, checkpoint=CheckpointConfig, log=LogConfig)


def largest_divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is at most `most`."""
    return next(d for d in range(min(total, most), 0, -1) if total % d == 0)


def _nearest_divisors(value: int, total: int) -> list[int]:
    """The closest divisors of total below a value and, within reach, above it."""
    above = range(value + 1, min(total, value + 100_000) + 1)
    return [largest_divisor(total, value), *[d for d in above if total % d == 0][:1]]


def _neighbours(count: int) -> list[int]:
    return [k for k in (count, count + 1) if k]


def free_keys() -> set[str]:
    """Dotted keys that may change when a run is continued."""
    keys = {key for key, (_, o) in options_of(RunConfig).items() if o.free_on_resume}
    for section, cls in SECTIONS.items():
        if cls is not None:
            keys |= {f"{section}.{key}" for key, (_, o) in options_of(cls).items() if o.free_on_resume}
    return keys


def all_keys(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Every dotted key of a run, with its type and declaration."""
    keys: dict[str, tuple[Any, Any]] = {}
    for section in SECTIONS:
        if (part := getattr(config, section)) is not None:
            keys |= {f"{section}.{key}": declared for key, declared in options_of(type(part)).items()}
    return keys | options_of(RunConfig)


def default_values(config: RunConfig) -> dict[str, Any]:
    """The declared default of every dotted key of a run."""
    out = {}
    for section in ("", *SECTIONS):
        part = getattr(config, section) if section else config
        if part is not None:
            declared = {f.name: f.default for f in fields(part) if "option" in f.metadata}
            out |= {f"{section}.{key}" if section else key: value for key, value in declared.items()}
    return out
