"""Pretrain a GPT-2.

    python train_gpt.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt.py config/gpt2_small.py --optimizer=adamw --seed=2

The same command continues an interrupted run; --fresh starts over and keeps the old folder under another name.
--as_published sets what the official runs of the papers did. CONFIG --help lists every key.
--preflight reports memory, disk, epochs, shards, time and the network, and stops; --verify hashes the shards, too,
and --tokens_per_s=N states a speed that the run folder does not know yet.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config.load import ConfigError, describe_keys, load_config, short_count, to_dict
from config.schema import RunConfig, free_keys
from data.choices import Item, count_right, read_items
from data.loader import TrainLoader, ValidationSet, prefetch, to_device
from data.shards import MANIFEST, Dataset, open_dataset
from data.tokenizer import get_tokenizer
from data.verify import faults
from model import GPT
from optimizers import build_optimizer
from optimizers.roles import claim_table, folded
from optimizers.state import load_named_state, named_state, state_bytes
from runtime.checkpoint import Checkpointer, CheckpointError
from runtime.compute import (
    autocast,
    bucket_size,
    cast_per_step,
    collector_paused,
    prepare,
    torch_settings,
    wants_bf16,
    wants_compile,
)
from runtime.distributed import StopRequest, World, start_world
from runtime.folder import add_facts, open_run_folder, run_lock
from runtime.guard import Guard, NonFiniteError
from runtime.hardware import environment, memory_gb, out_of_memory, peak_flops
from runtime.logger import METRICS, Meter, RunLogger, read_metrics
from runtime.micro_batch import Choice, choose, estimate, peak_of_pass
from runtime.plot import plot_run
from runtime.preflight import Footprint, Plan, measured_rate, report
from runtime.schedule import interpolate, learning_rate

FLAGS = ("--fresh", "--as_published", "--preflight", "--verify", "--help", "-h")
RATE = "--tokens_per_s="


class Trainer:
    """The pieces of one run, built from its config and the checkpoint it continues, if there is one."""

    def __init__(self, run: RunConfig, world: World, fresh: bool) -> None:
        self.run, self.world = run, world
        run.accumulation(world.size)  # refuses a batch that does not divide
        self.steps = run.total_steps
        dataset = open_dataset(run.data.path, run.model.vocab_size)
        sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
        ranks = dict(rank=world.rank, world_size=world.size)
        self.loader = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes, **ranks)
        self.validation = ValidationSet(dataset, run.data, micro_batch=run.micro_batch or 1, **sizes)
        self.bytes_per_token = dataset.bytes_per_token("val")
        self.choices = read_choices(run, dataset)

        torch.manual_seed(run.seed)
        self.model = GPT(run.model).to(world.device)
        prepare(self.model, run.compute, wants_bf16(run.dtype, world.device))
        self.compile = wants_compile(run.compile, world.device)
        self.optimizer = build_optimizer(self.model, run.optim, world.group, self.compile)
        if run.compute.cast_weights == "step":
            cast_per_step(self.model, self.optimizer)
        self.lookahead = getattr(self.optimizer, "needs_lookahead", False)
        self.guard = Guard(self.model, self.optimizer, run.grad_clip)

        facts = environment(world.device, world.size)
        self.folder = Path(run.log.folder) / run.name
        settings = to_dict(run) | {"dataset": dataset.fingerprint()}
        open_run_folder(self.folder, settings, free_keys(), facts, fresh, world)
        self.checkpoints = Checkpointer(self.folder / "checkpoints", run.checkpoint, world)
        self.step, self.val_loss, self.best, trained = self.restore()  # val_loss: of this very step, or None
        self.autocast = autocast(run.dtype, world.device)
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compile else self.model
        self.forward = self.compiled
        if world.size > 1:
            self.forward = DistributedDataParallel(
                self.compiled,
                bucket_cap_mb=bucket_size(self.model, run.compute),
                gradient_as_bucket_view=True,
            )
        self.choice = self.choose_micro_batch() if run.micro_batch is None else None
        self.micro_batch = self.validation.micro_batch = self.choice.micro_batch if self.choice else run.micro_batch
        self.accumulation = run.sequences // (world.size * self.micro_batch)
        add_facts(self.folder, dict(micro_batch=self.micro_batch, accumulation=self.accumulation), world)

        self.meter = Meter(trained)
        self.log = RunLogger(self.folder, run.log, settings, run.name, self.steps, self.step, world.is_main)
        self.passes = 2 if self.lookahead else 1  # gradient evaluations per step
        self.flops_per_step = self.passes * self.model.flops_per_token("palm") * run.tokens_per_step
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None

    def choose_micro_batch(self) -> Choice:
        """The most sequences that fit at a time: tried out on a GPU, reckoned on a CPU."""
        awaited = 0 if self.optimizer.state else state_bytes(self.optimizer)  # of torch's classes, at their first step

        def attempt(micro_batch: int) -> int:
            tokens = torch.zeros(micro_batch, self.run.model.block_size + 1, dtype=torch.uint16)

            def loss() -> Tensor:
                with self.unsynchronised(), self.autocast:
                    return self.forward(*to_device(tokens, self.world.device))

            return peak_of_pass(loss, self.model.parameters(), awaited, self.world.device)

        of, share = footprint(self.run, self.model, self.optimizer, self.world), self.run.sequences // self.world.size
        return choose(of, share, self.world, attempt)

    def restore(self) -> tuple[int, float | None, float | None, float]:
        """Step, its and the best validation loss and training seconds of the newest good checkpoint."""
        found = self.checkpoints.latest()
        if found is None:
            return 0, None, None, 0.0
        self.model.load_state_dict(found.model())
        load_named_state(self.optimizer, self.model, found.optimizer())
        state = found.state
        return state["step"], state.get("val_loss"), state.get("best_val_loss"), state.get("train_seconds", 0.0)

    def save(self) -> Path | None:
        """Write a checkpoint and return its folder or, in the background, begin to."""
        tensors = dict(self.model.named_parameters())
        state = dict(step=self.step, tokens=self.tokens, val_loss=self.val_loss, best_val_loss=self.best)
        state |= dict(train_seconds=self.meter.trained, config=to_dict(self.run), processes=self.world.size)
        return self.checkpoints.save(tensors, named_state(self.optimizer, self.model, self.world.rank), state)

    @property
    def tokens(self) -> int:
        return self.step * self.run.tokens_per_step

    @property
    def evaluation_due(self) -> bool:
        return self.step > 0 and (self.step == self.steps or self.step % self.run.eval_every == 0)

    def set_rates(self) -> float:
        """Set every group's learning rate, and gamma if it moves, for the coming step; returns the main rate."""
        optim = self.run.optim
        lr = learning_rate(self.run.schedule, self.step, self.steps, optim.lr)
        gamma_end = getattr(optim, "gamma_end", None)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (lr / optim.lr if optim.lr else 0.0)
            if gamma_end is not None:
                group["gamma"] = interpolate("linear", self.step / max(1, self.steps - 1), optim.gamma, gamma_end)
        return lr

    def accumulate(self, batch: Tensor, step: int) -> Tensor:
        """Gradients of the mean loss over a step's batch, synchronised once; returns this rank's mean loss."""
        torch.manual_seed(self.run.seed + 1_000_003 * (step + 1) + 7919 * self.world.rank)  # dropout, without a state
        total = torch.zeros((), device=self.world.device)
        share = 1 / self.accumulation
        for i, part in enumerate(batch.split(self.micro_batch)):
            with nullcontext() if i == self.accumulation - 1 else self.unsynchronised():
                with self.autocast:
                    loss = self.forward(*to_device(part, self.world.device))
                (loss * (share * self.run.grad_multiple)).backward()
            total += loss.detach() * share
        return total

    def unsynchronised(self) -> AbstractContextManager:
        """Where a backward pass keeps its gradients to this rank."""
        return self.forward.no_sync() if self.world.size > 1 else nullcontext()

    def look_ahead(self, following: Tensor) -> None:
        """Keep the next batch's gradient, clipped like any other, for the next step's correction."""
        self.accumulate(following, self.step + 1)
        self.guard.clip(self.step + 1)
        self.optimizer.update_previous_grad()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Take the step and drop its gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lookahead:
            self.optimizer.update_last_grad()

    @torch.no_grad()
    def evaluate(self, stop: StopRequest) -> None:
        """Mean loss over the validation windows, each batch on one rank.

        A stop request cuts it short; the evaluation is then made when the run continues.
        """
        sums = torch.zeros(2, len(self.validation), dtype=torch.float64, device=self.world.device)
        self.compiled.eval()
        for number in range(self.world.rank, len(self.validation), self.world.size):
            if stop.signal:
                break
            tokens = torch.from_numpy(self.validation.batch(number, self.step))
            count = tokens.size(0) * self.run.model.block_size
            whole = torch.zeros(self.micro_batch, tokens.size(1), dtype=tokens.dtype)
            whole[: tokens.size(0)] = tokens
            idx, targets = to_device(whole, self.world.device)
            targets = targets.clone()  # shares its memory with idx
            targets[tokens.size(0) :] = -1  # rows that fill up the last batch do not count
            with self.autocast:
                sums[0, number] = self.compiled(idx, targets).double() * count
            sums[1, number] = count
        self.compiled.train()
        loss_sum, count = self.world.sum(sums).sum(dim=1).tolist()
        if count < self.validation.count * self.run.model.block_size:
            return
        if not math.isfinite(loss_sum):
            raise NonFiniteError(
                f"the validation loss of step {self.step} is not finite; nothing is saved of it, "
                "and the checkpoints before it are good; use a smaller --lr, or --fresh to start over"
            )
        self.val_loss = loss_sum / count
        self.best = min(self.val_loss, self.best) if self.best is not None else self.val_loss
        numbers = dict(step=self.step, tokens=self.tokens, val_loss=self.val_loss)
        if self.bytes_per_token:
            numbers["val_bits_per_byte"] = self.bits_per_byte
        text = f"step {self.step:>6}  {self.validation_text()}"
        due = self.step // self.run.eval_every % self.run.data.choices_every == 0 or self.step == self.steps
        if self.choices and due:
            right, count = self.score_choices()
            numbers |= dict(hellaswag_acc_norm=right / count, hellaswag_items=round(count))
            text += f", {count:.0f} HellaSwag items {100 * right / count:.1f}% right"
        self.log.record(numbers, text)

    @property
    def bits_per_byte(self) -> float:
        return self.val_loss / self.bytes_per_token / math.log(2)

    def validation_text(self) -> str:
        """The last validation loss, per token and, where the dataset knows its bytes, per byte."""
        text = f"validation loss {self.val_loss:.4f} nats/token"
        if self.bytes_per_token:
            text += f", {self.bits_per_byte:.4f} bits/byte"
        return text

    def score_choices(self) -> tuple[float, float]:
        """HellaSwag items answered rightly and scored, each on one rank, by the model as it is not compiled."""
        mine = self.choices[self.world.rank :: self.world.size]
        self.model.eval()
        with self.autocast:
            sums = count_right(self.model, mine, self.world.device, self.run.data.choices_seconds)
        self.model.train()
        right, count = self.world.sum(sums).tolist()
        return right, count

    def report(self, loss: Tensor, norm: Tensor, lr: float, steps: int) -> None:
        """Log one step; times are means over the `steps` steps since the last report."""
        loss = (self.world.sum(loss) / self.world.size).item()
        numbers = dict(step=self.step, tokens=self.tokens, loss=loss, lr=lr, grad_norm=norm.item())
        numbers["gradient_evaluations"] = self.step * self.passes
        seconds, waited = (t / steps for t in self.meter.read())
        rate = self.run.tokens_per_step / seconds
        numbers |= dict(tokens_per_s=rate, step_ms=1e3 * seconds, data_ms=1e3 * waited)
        numbers |= dict(memory_gb=memory_gb(self.world.device), train_s=self.meter.trained)
        left = timedelta(seconds=round(seconds * (self.steps - self.step)))
        text = f"step {self.step:>6}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  norm {numbers['grad_norm']:.3f}"
        text += f"  {short_count(round(rate))} tok/s  {1e3 * seconds:.0f} ms"
        if self.peak:
            numbers["mfu"] = self.flops_per_step / seconds / self.peak
            text += f"  MFU {100 * numbers['mfu']:.1f}%"
        self.log.record(numbers, f"{text}  left {left}")

    def blame(self, step: int) -> str:
        """Which sequences of a step's batch have a loss that is not finite, as shard and token offset."""
        rows = self.loader.batch(step)
        ids = self.loader.window_ids(step)[self.loader.mine]
        bad = []
        with torch.no_grad(), self.autocast:
            for row, window in zip(rows, ids, strict=True):
                if not torch.isfinite(self.model(*to_device(row[None], self.world.device))):
                    shard, offset = self.loader.windows.locate(window)
                    bad.append(f"{shard.path.name}@{offset}")
        bad = [name for names in self.world.gather(bad) for name in names]
        return ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "") if bad else "none by itself"


def train(t: Trainer) -> None:
    """Run steps until the budget is spent or somebody asks to stop."""
    stop = StopRequest(t.world)
    batches: Iterator[Tensor] = prefetch(t.loader, t.step, pin=t.world.device.type == "cuda")
    batch, logged, stopping, unsaved = next(batches), t.step, False, False
    try:
        if t.evaluation_due and t.val_loss is None:  # a stop request came in its way
            t.evaluate(stop)
            unsaved = try_to_save(t, t.save)
        while t.step < t.steps and not stopping:
            with t.meter.waiting():
                following = next(batches)
            lr = t.set_rates()
            if t.lookahead:  # exact form: the next batch's gradient at the present weights
                t.look_ahead(following)
            loss = t.accumulate(batch, t.step)
            norm = t.guard.clip(t.step)
            t.update()
            batch, t.step, t.val_loss = following, t.step + 1, None

            stopping, last = stop.agreed(), t.step == t.steps
            log_due = last or stopping or t.step % t.run.log.every == 0
            save_due = last or stopping or t.step % t.run.checkpoint.every == 0
            if log_due or t.evaluation_due or save_due or t.world.device.type == "cpu":
                t.guard.check()  # before anything is saved
            if log_due:
                t.report(loss, norm, lr, t.step - logged)
                logged = t.step
            with t.meter.excluded():
                if t.evaluation_due or save_due:
                    gc.collect()  # at rest in between
                if t.evaluation_due:
                    t.evaluate(stop)
                try_to_save(t, t.checkpoints.finish if save_due else t.checkpoints.poll)  # one in the background
                if save_due:
                    unsaved = try_to_save(t, t.save)
        if try_to_save(t, t.checkpoints.finish) or unsaved:
            raise CheckpointError(f"the run stops at step {t.step} without its last checkpoint; see above")
    except Exception as error:
        if t.world.size == 1 or isinstance(error, NonFiniteError):  # the ranks are still together
            try_to_save(t, t.checkpoints.finish)
        raise
    finally:
        batches.close()
        stop.close()
    if stopping and t.step < t.steps:
        t.log.say(f"stopped at step {t.step} of {t.steps}; the same command continues the run")


def try_to_save(t: Trainer, part: Callable[[], Path | None]) -> bool:
    """Do a part of saving; a full disk or the like costs a checkpoint and nothing else. Returns whether it failed."""
    try:
        if folder := part():
            t.log.say(f"saved {folder}")
        return False
    except CheckpointError as error:
        t.log.say(f"{error}; training goes on, earlier checkpoints are untouched")
        return True


def introduce(t: Trainer) -> None:
    """Say what is about to run."""
    run, world = t.run, t.world
    c = run.model
    t.log.say(
        f"{run.name}\n"
        f"  model      {t.model.num_params():,} parameters: {c.n_layer} layers x {c.n_embd}, context {c.block_size}\n"
        f"  data       {run.data.path}: {t.loader.epochs(t.steps):.2f} epochs of "
        f"{len(t.loader.windows):,} windows, {run.data.sampling}\n"
        f"  batch      {run.sequences} sequences = {world.size} processes x {t.micro_batch} x "
        f"{t.accumulation} accumulated = {run.tokens_per_step:,} tokens\n"
        f"{f'  chosen     {t.choice}{chr(10)}' if t.choice else ''}"
        f"  budget     {t.steps:,} steps = {t.steps * run.tokens_per_step:,} tokens\n"
        f"  optimizer  {run.optimizer}: {run.optim}\n"
        f"  state      {state_bytes(t.optimizer) / 1e6:,.1f} MB of optimizer state in this process\n"
        f"  device     {world.device}, {run.compute}\n"
        f"  folder     {t.folder}"
    )
    rows = claim_table(t.optimizer, {p: name for name, p in t.model.named_parameters()})
    header = ("tensor", "shape", "estimate x direction", "lr", "decay")
    if world.is_main:
        try:
            (t.folder / "parameters.txt").write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
        except OSError as error:
            t.log.say(f"parameters.txt cannot be written ({error.strerror}); training goes on without it")
    for name, shape, rule, lr, decay in (header, *folded(rows)):
        t.log.say(f"  {name:36} {shape:>12}  {rule:32} {lr:>8} {decay:>6}")
    if t.step:
        t.log.say(f"continuing at step {t.step}")


def footprint(run: RunConfig, model: GPT, optimizer: torch.optim.Optimizer, world: World) -> Footprint:
    """What a run's memory depends on."""
    c = run.model
    return Footprint(
        **dict(params=model.num_params(), state=state_bytes(optimizer), layers=c.n_layer, width=c.n_embd),
        **dict(vocab=c.padded_vocab_size, block=c.block_size, half=wants_bf16(run.dtype, world.device)),
        **dict(stream=(model.residual_dtype or torch.float32).itemsize, recompute=model.recompute_blocks),
        processes=world.size,
    )


def read_choices(run: RunConfig, dataset: Dataset) -> list[Item]:
    """The HellaSwag items a run scores on its way; none if it names no file."""
    if not run.data.choices:
        return []
    tokenizer = get_tokenizer(dataset.manifest.get("tokenizer", {}).get("name", "gpt2"))
    return read_items(run.data.choices, run.data.choices_items, tokenizer)


def plan(run: RunConfig, world: World, verify: bool, rate: float | None) -> Plan:
    """What a preflight needs to know; raises ValueError for a file or a batch that cannot be used."""
    c, folder = run.model, Path(run.log.folder) / run.name
    run.accumulation(world.size)
    dataset = open_dataset(run.data.path, c.vocab_size)
    read_choices(run, dataset)
    sizes = dict(block_size=c.block_size, batch_size=run.sequences, vocab_size=c.vocab_size, seed=run.seed)
    epochs = TrainLoader(dataset, run.data, **sizes).epochs(run.total_steps)
    known = (dataset.folder / MANIFEST).exists()
    found = world.gather(faults(dataset.folder, verify, world.rank, world.size) if known else [])
    checked = "headers, counts and sha256 agree" if verify else "headers and counts agree; --verify hashes them, too"
    with torch.device("meta"):
        model = GPT(c)
        prepare(model, run.compute, wants_bf16(run.dtype, world.device))
    optimizer = build_optimizer(model, run.optim, world.group)
    if rate is None and (folder / METRICS).exists():
        rate = measured_rate(read_metrics(folder / METRICS))
    of = footprint(run, model, optimizer, world)
    micro_batch = run.micro_batch or estimate(of, run.sequences // world.size, world)
    return Plan(
        **dict(name=run.name, folder=folder, footprint=of),
        **dict(whole_state=state_bytes(build_optimizer(model, run.optim))),
        **dict(sequences=run.sequences, micro_batch=micro_batch, estimated=run.micro_batch is None),
        **dict(steps=run.total_steps, epochs=epochs),
        **dict(dataset=run.data.path, train_tokens=dataset.tokens("train")),
        shards="; ".join(fault for part in found for fault in part) if known else None,
        checked=checked if known else "headers agree; there is no manifest to check against",
        checkpoint=run.checkpoint,
        rate=rate,
    )


def preflight(run: RunConfig, world: World, verify: bool, rate: str | None) -> None:
    """Report what the run needs and stop, with an exit status that says whether all of it is there."""
    try:
        told = float(rate) if rate is not None else None
    except ValueError:
        raise ValueError(f"{RATE}{rate}: expected a number") from None
    if told is not None and not 1 <= told < math.inf:
        raise ValueError(f"{RATE}{rate}: must be a number of at least 1")
    text, good = report(plan(run, world, verify, told), world)
    if world.is_main:
        print(text, flush=True)
    if not world.from_main(good):
        sys.exit(1)


def conclude(t: Trainer) -> None:
    """Draw the curves and say where everything is."""
    if t.world.is_main:
        try:
            t.log.say(f"curves  {plot_run(t.folder)}")
        except (ImportError, ValueError, OSError) as error:
            t.log.say(f"no curves: {error}")
        if t.step == t.steps and t.val_loss is not None:
            t.log.say(f"final   {t.validation_text()}")
        t.log.say(f"run     {t.folder}")


def train_run(run: RunConfig, world: World, fresh: bool) -> None:
    """Build the pieces, train, and say how it ended."""
    trainer = Trainer(run, world, fresh)
    introduce(trainer)
    try:
        with collector_paused():
            train(trainer)
    except NonFiniteError as error:
        told = f"; sequences: {trainer.blame(error.step)}" if error.step >= 0 else ""
        raise NonFiniteError(f"{error}{told}") from None
    finally:
        trainer.log.close()
    conclude(trainer)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    paths = [a for a in argv if not a.startswith("-")]
    flags = {a for a in argv if a in FLAGS}
    if not paths:
        sys.exit(f"{__doc__}\nusage: train_gpt.py CONFIG [--key=value ...] [{'] ['.join(FLAGS[:-1])}]")
    try:
        if len(paths) > 1:
            raise ConfigError([f"{' '.join(paths)}: expected one config file, and each setting as --key=value"])
        if valued := [a for a in argv if a.partition("=")[0] in FLAGS and a not in FLAGS]:
            raise ConfigError([f"{a}: takes no value" for a in valued])
        rates = [a.removeprefix(RATE) for a in argv if a.startswith(RATE)]
        overrides = [a for a in argv if a not in flags | set(paths) and not a.startswith(RATE)]
        run = load_config(paths[0], overrides, as_published="--as_published" in flags)
        if flags & {"--help", "-h"}:
            print(f"{__doc__}\nkeys, as {paths[0]} sets them:\n{describe_keys(run)}")
            return
        if "--preflight" not in flags and (rates or "--verify" in flags):
            raise ConfigError([f"{RATE}N and --verify: belong to --preflight; give that, too"])
        with torch_settings(run.compute), start_world(run.device) as world:
            if "--preflight" in flags:
                preflight(run, world, "--verify" in flags, rates[-1] if rates else None)
                return
            with run_lock(Path(run.log.folder) / run.name, world):
                train_run(run, world, "--fresh" in flags)
    except ConfigError as error:
        sys.exit(str(error))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"train_gpt: {error}")
    except KeyboardInterrupt:  # outside the loop, which finishes its step
        sys.exit("train_gpt: interrupted; the checkpoints so far are untouched, and the same command continues")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            sys.exit(f"train_gpt: out of memory; use a smaller --micro_batch or model ({str(error).splitlines()[0]})")
        raise


if __name__ == "__main__":
    main()
