"""The configuration of a run: each package declares its section; this module assembles and checks them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.loader import DataConfig
from model import GPTConfig
from optimizers import MARSMConfig, Settings
from optimizers.options import Option, errors_of, option, options_of
from runtime.errors import UserError
from training.checkpoint import CheckpointConfig
from training.compute import ComputeConfig
from training.logger import LogConfig
from training.memory import divisors
from training.schedule import Moves, ScheduleConfig, parse_moves

SECTIONS = ("model", "data", "optim", "schedule", "compute", "checkpoint", "log")
ALTERNATIVES = (("batch_size", "batch_tokens"), ("steps", "tokens"))  # two ways to set the same thing


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Batch size and budget do not depend on the number of processes."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: Settings = field(default_factory=MARSMConfig)  # load_config sets those of the selected optimizer
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    size: str = option("", "name of the model size; empty: the name of the config file", on_resume="free")
    name: str = option("", "run folder; empty: size, optimizer, dataset, budget and overrides", on_resume="free")
    optimizer: str = option("mars_m", "which optimizer to use")
    init_from: str = option(
        "", "start with the weights of a run, RUN@STEP, a Hugging Face folder, a .pt file, gpt2, ... gpt2-xl"
    )
    branch_from: str = option("", "RUN@STEP: start from this checkpoint, with optimizer state and position in the data")
    seed: int = option(1, "random seed for initial weights, data order and dropout", least=0, most=2**62 - 1)

    batch_size: int | None = option(480, "sequences per step, over all processes", least=1, most=2**24)
    batch_tokens: int | None = option(None, "tokens per step, instead of batch_size", least=1, most=2**31)
    steps: int | None = option(None, "budget in steps", least=1, most=2**31)
    tokens: int | None = option(
        None, "budget in tokens, instead of steps; the last step is rounded up", least=1, most=2**46
    )
    micro_batch: int | None = option(
        None,
        "sequences per pass, at most; the largest divisor of a process's batch is used. auto: the largest that fits",
        least=1,
        on_resume="free",
    )
    grad_multiple: int = option(1, "factor on mean gradients; 4 or 12: sum over micro-batches (as published)", least=1)
    ema: float = option(0.0, "decay of an average of the weights, for example 0.999; 0: no average", least=0, below=1)
    grad_clip: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0)

    device: str = option("auto", "auto, cpu, cuda or cuda:N", on_resume="free")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "bfloat16 uses autocast; auto: bfloat16 on a GPU that supports it", on_resume="free"
    )
    compile: Literal["auto", "true", "false"] = option(
        "auto", "compile model and optimizer; auto: on a GPU", on_resume="free"
    )
    eval_every: int = option(1000, "steps between evaluations; the last step has one", least=1, on_resume="free")

    def errors(self) -> list[str]:
        """Everything wrong with this run, one line each; sections first."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        out = [f"{name}.{error}" for name, section in sections.items() for error in section.errors()]
        out += errors_of(self)
        for pair in ALTERNATIVES:
            given = {key: getattr(self, key) for key in pair if getattr(self, key) is not None}
            if len(given) != 1:
                found = " and ".join(f"{k}={v}" for k, v in given.items()) or "neither"
                out.append(f"{pair[0]} or {pair[1]}: give exactly one ({found} given)")
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable():
            out.append(f"name={self.name!a}: must be a plain folder name; log.folder is the folder around it")
        return out or self._combination_errors()

    def _combination_errors(self) -> list[str]:
        """Errors between settings that are correct one by one."""
        out = []
        if self.batch_tokens and self.batch_tokens % (size := self.model.block_size):
            near = " or ".join(str(n * size) for n in (self.batch_tokens // size, self.batch_tokens // size + 1) if n)
            out.append(f"batch_tokens={self.batch_tokens}: must be a multiple of block_size={size}, as {near}")
        heads = getattr(self.optim, "split_heads", 0)
        if heads not in (0, self.model.n_head):
            out.append(f"optim.split_heads={heads}: must be n_head={self.model.n_head}, the model's heads, or 0")
        if (self.schedule.min_lr or 0.0) > self.optim.lr:
            out.append(f"schedule.min_lr={self.schedule.min_lr}: is above optim.lr={self.optim.lr}, the peak")
        moves = parse_moves(self.schedule.moves)
        # the learning rate follows schedule.shape
        numbers = [key for key in self.optim.as_group() if isinstance(getattr(self.optim, key), float) and key != "lr"]
        if unknown := moves.keys() - numbers:
            for key in sorted(unknown):
                out.append(f'schedule.moves: {self.optimizer} cannot move "{key}"; it can move {", ".join(numbers)}')
        else:
            final = {key: 0.0 if value is None else value for key, value in moves.items()}  # the rate may end at 0
            out += [f"schedule.moves: final {error}" for error in self.optim.changed(**final).errors()]
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
        return self.steps_after(0, 0)

    def steps_after(self, step: int, tokens: int) -> int:
        """Steps of the whole run, if its first `step` steps had `tokens` tokens, perhaps with another batch size."""
        if self.steps is not None:
            return self.steps
        return step + max(0, -(-((self.tokens or 0) - tokens) // self.tokens_per_step))

    @property
    def moves(self) -> Moves:
        """Hyperparameters of the optimizer that move over the run, with their final values, or None to follow lr."""
        return parse_moves(self.schedule.moves)

    def per_process(self, world_size: int) -> int:
        """Sequences per step of one process. Raises UserError, with advice, if the batch does not divide."""
        count, rest = divmod(self.sequences, world_size)
        if not rest:
            return count
        advice = [f"{divisors(self.sequences, world_size)[0]} processes"]
        advice += [f"--batch_size={world_size * k}" for k in (count, count + 1) if k]
        raise UserError(
            f"a batch of {self.sequences} sequences does not divide into {world_size} processes; "
            f"use {' or '.join(advice)}"
        )


def all_keys(config: RunConfig) -> dict[str, Option]:
    """Every dotted key of a run, with its declaration."""
    keys: dict[str, Option] = {}
    for name in SECTIONS:
        keys |= {f"{name}.{key}": declared for key, declared in options_of(type(getattr(config, name))).items()}
    return keys | options_of(RunConfig)


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    section, _, last = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, last)


def changeable_keys(run: RunConfig, accept_changes: bool = False) -> set[str]:
    """Dotted keys that may change when a run is resumed.

    The budget may change with a constant schedule, and with wsd, whose decay moves to the new end.
    accept_changes: every key may change, except those of the model.
    """
    keys = all_keys(run)
    if accept_changes:
        return {"dataset", *(key for key in keys if not key.startswith("model."))}
    goes_on = run.schedule.shape in ("constant", "wsd") and not run.moves
    budget = {"steps", "tokens"} if goes_on else set()
    return budget | {key for key, declared in keys.items() if declared.free_on_resume}


def default_values(config: RunConfig) -> dict[str, Any]:
    """The declared default of every dotted key of a run."""
    defaults = RunConfig(optim=type(config.optim)())
    return {key: value_of(defaults, key) for key in all_keys(config)}
