"""The configuration of a run: sections declared by the rooms that read them, assembled and cross-checked here."""

from dataclasses import dataclass, field, fields

from data.loader import DataConfig
from model import GPTConfig
from optimizers import OptimizerConfig
from runtime.checkpoint import CheckpointConfig
from runtime.compute import ComputeConfig
from runtime.logger import LogConfig
from runtime.schedule import ScheduleConfig

FREE = {"free": True}  # a run may be continued with another value
ALTERNATIVES = (("batch_size", "batch_tokens"), ("steps", "tokens"))  # two ways to say one thing
MOST_STEPS = 2**31  # of a run; sequences are counted in 64 bits
MOST_TOKENS = 2**31  # of a step; a batch and its order are held in memory
SECTIONS = ("model", "data", "optim", "schedule", "compute", "checkpoint", "log")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Batch and budget are stated once, independent of the machine."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimizerConfig | None = None  # settings of the chosen optimizer, filled in by the loader
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    size: str = ""  # name of the model size, from the config file's name
    name: str = ""  # run folder; "" builds it from size, optimizer, dataset, budget and overrides
    optimizer: str = "adamw"  # which of the config file's optimizers to use
    seed: int = 1  # of initial weights, data order and dropout

    batch_size: int | None = 480  # sequences per step, over all processes
    batch_tokens: int | None = None  # the same in tokens
    steps: int | None = None  # budget in steps
    tokens: int | None = None  # the same in tokens; the last step is rounded up
    micro_batch: int | None = field(default=None, metadata=FREE)  # sequences per process and pass; auto: what fits
    grad_multiple: int = 1  # gradients are this many times the mean: sums over 4 or 12 micro-batches as published
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping

    device: str = field(default="auto", metadata=FREE)  # "auto", "cpu", "cuda" or "cuda:N"
    dtype: str = field(default="auto", metadata=FREE)  # "auto", "bfloat16" (autocast) or "float32"
    compile: str = field(default="auto", metadata=FREE)  # "auto" (on a GPU), "true" or "false"
    eval_every: int = field(default=1000, metadata=FREE)  # steps between evaluations; the last step is always evaluated

    def faults(self) -> list[str]:
        """Everything wrong with this run, a line each; sections first."""
        out = [f"{s}.{fault}" for s in SECTIONS if (part := getattr(self, s)) is not None for fault in part.faults()]
        for pair in ALTERNATIVES:
            given = {key: getattr(self, key) for key in pair if getattr(self, key) is not None}
            if len(given) != 1:
                told = " and ".join(f"{k}={v}" for k, v in given.items()) or "neither"
                out.append(f"{pair[0]} or {pair[1]}: give exactly one ({told} given)")
        for key in ("batch_size", "batch_tokens", "steps", "tokens", "micro_batch", "eval_every", "grad_multiple"):
            if (value := getattr(self, key)) is not None and value < 1:
                out.append(f"{key}={value}: must be at least 1")
        if self.batch_tokens and self.batch_tokens > 0 and self.batch_tokens % max(1, self.model.block_size):
            out.append(f"batch_tokens={self.batch_tokens}: must be a multiple of block_size={self.model.block_size}")
        if not 0 <= self.seed < 2**62:
            out.append(f"seed={self.seed}: must be at least 0 and below 2^62")
        if self.optim is not None and (self.schedule.min_lr or 0.0) > self.optim.lr:
            out.append(f"schedule.min_lr={self.schedule.min_lr}: is above optim.lr={self.optim.lr}, the peak")
        if not self.grad_clip >= 0:
            out.append(f"grad_clip={self.grad_clip}: must be >= 0 (0 switches clipping off)")
        choices = {
            "dtype": ("auto", "bfloat16", "float32"),
            "compile": ("auto", "true", "false"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                out.append(f'{key}="{getattr(self, key)}": must be one of {", ".join(allowed)}')
        if "/" in self.name or self.name in (".", "..") or not self.name.isprintable():
            out.append(f"name={self.name!a}: must be a plain folder name; the folder around it is log.folder")
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
        if self.batch_size is not None:
            return self.batch_size
        return self.batch_tokens // self.model.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.model.block_size

    @property
    def total_steps(self) -> int:
        return self.steps if self.steps is not None else -(-self.tokens // self.tokens_per_step)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per process and step; where their size is open, as if it were 1.

        Raises ValueError, with the nearest choices, if nothing divides.
        """
        micro_batch = self.micro_batch or 1
        per_round = micro_batch * world_size
        if self.sequences % per_round == 0:
            return self.sequences // per_round
        advice = []
        if self.sequences % world_size == 0:
            advice += [f"--micro_batch={m}" for m in _nearest_divisors(micro_batch, self.sequences // world_size)]
        if self.sequences % micro_batch == 0:
            advice += [f"{w} processes" for w in _nearest_divisors(world_size, self.sequences // micro_batch)]
        sizes = [per_round * k for k in (self.sequences // per_round, self.sequences // per_round + 1) if k]
        advice += [f"--batch_size={b}" for b in sizes]
        raise ValueError(
            f"a batch of {self.sequences} sequences does not divide into {world_size} processes"
            f"{f' x micro_batch={micro_batch}' if self.micro_batch else ''}; nearest that do: {', '.join(advice)}"
        )


def _nearest_divisors(value: int, total: int, reach: int = 100_000) -> list[int]:
    """The closest divisors of total at or below a value and above it, within reach."""
    below = range(min(value, total), max(0, value - reach), -1)
    above = range(value + 1, min(total, value + reach) + 1)
    return [found for side in (below, above) if (found := next((d for d in side if total % d == 0), None))]


def free_keys() -> set[str]:
    """Dotted keys that may change when a run is continued."""
    out = {"size", "name"}
    for f in fields(RunConfig):
        if f.metadata.get("free"):
            out.add(f.name)
        if f.name in SECTIONS and f.name != "optim":
            out |= {f"{f.name}.{g.name}" for g in fields(f.default_factory) if g.metadata.get("free")}
    return out
