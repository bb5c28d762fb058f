"""Pretrain a GPT-2.

    python train_gpt.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt.py config/gpt2_small.py --optimizer=adamw --seed=2

The same command continues an interrupted run. Any key of the config may follow as --key=value or --key value;
CONFIG --help lists them all.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config.load import ConfigError, describe_keys, load_config, to_dict
from config.schema import RunConfig, changeable_keys, default_values, largest_divisor
from data.hellaswag import HellaSwag
from data.loader import TrainLoader, ValidationSet, prefetch, to_device
from data.shards import open_dataset
from model import GPT
from optimizers import build_optimizer
from optimizers.state import load_named_state, named_state, state_bytes, state_problem
from runtime import console
from runtime.checkpoint import Checkpointer, CheckpointError
from runtime.clipping import GradientClipper, NonFiniteError
from runtime.command import Parser, join_values, one_line
from runtime.compute import (
    apply_compute,
    autocast,
    bucket_size,
    cast_per_step,
    collector_paused,
    start_compile_workers,
    torch_settings,
    wants_bf16,
    wants_compile,
)
from runtime.distributed import StopRequest, World, start_world
from runtime.evaluation import validation_loss
from runtime.folder import Comparison, add_facts, open_run_folder, run_lock
from runtime.hardware import environment, memory_gb, peak_flops
from runtime.logger import Meter, RunLogger
from runtime.memory import MicroBatch, choose_micro_batch, peak_of_pass
from runtime.plot import plot_run
from runtime.preflight import memory_estimate, preflight
from runtime.schedule import set_rates


class Trainer:
    """The parts of one run, built from its config and from the checkpoint it continues, if there is one."""

    def __init__(self, run: RunConfig, world: World, fresh: bool) -> None:
        self.run, self.world, self.steps = run, world, run.total_steps
        share = run.per_process(world.size)  # refuses a batch that does not divide
        dataset = open_dataset(run.data.path, run.model.vocab_size)
        sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
        ranks = dict(rank=world.rank, world_size=world.size)
        self.loader = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes, **ranks)
        self.bytes_per_token = dataset.bytes_per_token("val")
        self.hellaswag = HellaSwag.of_run(run.data, dataset) if run.data.hellaswag else None

        torch.manual_seed(run.seed)
        self.model = GPT(run.model).to(world.device)
        apply_compute(self.model, run.compute, wants_bf16(run.dtype, world.device))
        self.compile = wants_compile(run.compile, world.device)
        if self.compile:
            start_compile_workers()
        self.optimizer = build_optimizer(self.model, run.optim, world.group, self.compile)
        if problem := state_problem(self.optimizer, self.model):
            raise ValueError(f"optimizer={run.optimizer}: checkpoints cannot keep its state ({problem})")
        if run.compute.cast_weights == "step":
            cast_per_step(self.model, self.optimizer)
        self.lookahead = getattr(self.optimizer, "needs_lookahead", False)
        self.guard = GradientClipper(self.model, self.optimizer, run.grad_clip)

        self.folder = Path(run.log.folder) / run.name
        settings = to_dict(run) | {"dataset": dataset.fingerprint()}
        comparison = Comparison(changeable_keys(), default_values(run))
        open_run_folder(self.folder, settings, comparison, environment(world.device, world.size), fresh, world)
        self.checkpoints = Checkpointer(self.folder / "checkpoints", run.checkpoint, world)
        self.step, self.val_loss, self.best, trained = self.restore()  # val_loss: at this very step, or None

        self.autocast = autocast(run.dtype, world.device)
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compile else self.model
        self.forward = self.compiled
        if world.size > 1:
            buckets = bucket_size(self.model, run.compute)
            self.forward = DistributedDataParallel(self.compiled, bucket_cap_mb=buckets, gradient_as_bucket_view=True)
        self.chosen = self.try_micro_batches(share) if run.micro_batch is None else None
        self.micro_batch = self.chosen.size if self.chosen else largest_divisor(share, run.micro_batch)
        self.accumulation = share // self.micro_batch
        self.validation = ValidationSet(dataset, run.data, micro_batch=self.micro_batch, **sizes)
        add_facts(self.folder, dict(micro_batch=self.micro_batch, accumulation=self.accumulation), world)

        self.meter = Meter(trained)
        self.log = RunLogger(self.folder, run.log, settings, run.name, self.steps, self.step, world.is_main)
        self.passes = 2 if self.lookahead else 1  # gradient evaluations per step
        self.flops_per_step = self.passes * self.model.flops_per_token("palm") * run.tokens_per_step
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.batches: Iterator[Tensor] = prefetch(self.loader, self.step, pin=world.device.type == "cuda")
        self.following: Tensor | None = None  # the batch after the one that next_batch returned
        self.last: tuple[Tensor, Tensor, float] | None = None  # loss, gradient norm and rate of the last step
        self.logged_step, self.saved_step = self.step, self.step

    def try_micro_batches(self, share: int) -> MicroBatch:
        """The largest micro-batch that fits: measured on a GPU, estimated on a CPU."""
        # torch optimizers allocate state lazily; reserve room for it
        reserve = 0 if self.optimizer.state else state_bytes(self.optimizer)

        def attempt(micro_batch: int) -> int:
            tokens = torch.zeros(micro_batch, self.run.model.block_size + 1, dtype=torch.uint16)

            def loss() -> Tensor:
                with self.unsynchronised(), self.autocast:
                    return self.forward(*to_device(tokens, self.world.device))

            return peak_of_pass(loss, self.model.parameters(), reserve, self.world.device)

        need = memory_estimate(self.run, self.model, self.optimizer, self.world)
        return choose_micro_batch(need, share, self.world, attempt)

    def restore(self) -> tuple[int, float | None, float | None, float]:
        """Step, its and the best validation loss, and training seconds of the newest good checkpoint."""
        found = self.checkpoints.latest()
        if found is None:
            return 0, None, None, 0.0
        self.model.load_state_dict(found.model())
        load_named_state(self.optimizer, self.model, found.optimizer())
        state = found.state
        return state["step"], state.get("val_loss"), state.get("best_val_loss"), state.get("train_seconds", 0.0)

    @property
    def tokens(self) -> int:
        return self.step * self.run.tokens_per_step

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens after this step."""
        return self.step > 0 and (self.step == self.steps or self.step % every == 0)

    # ---- one step

    def next_batch(self) -> Tensor:
        """This rank's share of the coming step's batch; the batch after it is kept in `following`."""
        with self.meter.waiting():
            batch = next(self.batches) if self.following is None else self.following
            self.following = next(self.batches)
        return batch

    def set_rates(self) -> float:
        """Set what changes from step to step in the optimizer; returns the main learning rate."""
        return set_rates(self.optimizer, self.run.optim, self.run.schedule, self.run.moves, self.step, self.steps)

    def gradients(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the clipped gradients of a batch in the parameters; returns this rank's mean loss and their norm."""
        if self.lookahead:  # exact form: first the next batch's gradient at the present weights
            self.accumulate(self.following, self.step + 1)
            self.guard.clip(self.step + 1)
            self.optimizer.update_previous_grad()
            self.optimizer.zero_grad(set_to_none=True)
        return self.accumulate(batch, self.step), self.guard.clip(self.step)

    def accumulate(self, batch: Tensor, step: int) -> Tensor:
        """Gradients of the mean loss over a step's batch, averaged over ranks; returns this rank's mean loss."""
        # every step has its own dropout, which needs no state
        torch.manual_seed(self.run.seed + 1_000_003 * (step + 1) + 7919 * self.world.rank)
        total = torch.zeros((), device=self.world.device)
        for i, part in enumerate(batch.split(self.micro_batch)):
            with nullcontext() if i == self.accumulation - 1 else self.unsynchronised():
                with self.autocast:
                    loss = self.forward(*to_device(part, self.world.device))
                (loss * (self.run.grad_multiple / self.accumulation)).backward()
            total += loss.detach() / self.accumulation
        return total

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Backward passes inside keep their gradients to this rank."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def update(self) -> None:
        """Take the step and drop its gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lookahead:
            self.optimizer.update_last_grad()
        self.step, self.val_loss = self.step + 1, None

    # ---- between steps

    def log_if_due(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Log the step. Before anything is logged or saved, and on a CPU always, check that gradients are finite."""
        self.last = (loss, norm, lr)
        evaluated_or_saved = self.due(self.run.eval_every) or self.due(self.run.checkpoint.every)
        due = self.due(self.run.log.every)
        if due or evaluated_or_saved or self.world.device.type == "cpu":
            self.guard.check()
        if due:
            self.log_step()

    def log_step(self) -> None:
        """Log the last step; times are means over the steps since the last report."""
        if self.last is None or self.logged_step == self.step:
            return
        loss, norm, lr = self.last
        loss = (self.world.sum(loss.clone()) / self.world.size).item()
        seconds, waited = (t / (self.step - self.logged_step) for t in self.meter.read())
        numbers = dict(step=self.step, tokens=self.tokens, loss=loss, lr=lr, grad_norm=norm.item())
        numbers |= dict(gradient_evaluations=self.step * self.passes, tokens_per_s=self.run.tokens_per_step / seconds)
        numbers |= dict(step_ms=1e3 * seconds, data_ms=1e3 * waited, memory_gb=memory_gb(self.world.device))
        numbers |= dict(train_s=self.meter.trained)
        if self.peak:
            numbers["mfu"] = self.flops_per_step / seconds / self.peak
        self.log.record(numbers, console.step_line(numbers, self.steps))
        self.logged_step = self.step

    def evaluate_if_due(self, stop: StopRequest) -> None:
        """Evaluate, unless this step has been evaluated; a stop request cuts it short, and a resume makes up for it."""
        if not self.due(self.run.eval_every) or self.val_loss is not None:
            return
        with self.meter.excluded():
            gc.collect()  # automatic garbage collection is off between evaluations
            loss = self.evaluate(stop)
            if loss is None:
                return
            self.val_loss = loss
            self.best = min(loss, self.best) if self.best is not None else loss
            numbers = dict(step=self.step, tokens=self.tokens, val_loss=loss)
            if self.bytes_per_token:
                numbers["val_bits_per_byte"] = console.bits_per_byte(loss, self.bytes_per_token)
            number = self.step // self.run.eval_every
            if self.hellaswag and (number % self.run.data.hellaswag_every == 0 or self.step == self.steps):
                numbers |= self.hellaswag.score(self.model, self.world, self.autocast)
            self.log.record(numbers, console.validation_line(numbers))

    def evaluate(self, stop: StopRequest) -> float | None:
        """Mean loss over the validation set, shared by all ranks; None if a stop request came."""
        return validation_loss(self.validation, self.step, self.compiled, self.world, self.autocast, stop)

    def save_if_due(self) -> None:
        """Save a checkpoint if one is due, and publish one that was written in the background.

        A full disk costs a checkpoint and nothing else.
        """
        due = self.due(self.run.checkpoint.every) and self.saved_step != self.step
        with self.meter.excluded():
            self.publish(wait=due)
            if due:
                gc.collect()
                self.save()

    def save(self) -> None:
        """Write a checkpoint or, in the background, start to."""
        state = dict(step=self.step, tokens=self.tokens, val_loss=self.val_loss, best_val_loss=self.best)
        state |= dict(train_seconds=self.meter.trained, config=to_dict(self.run), processes=self.world.size)
        tensors = named_state(self.optimizer, self.model, self.world.rank)
        try:
            saved = self.checkpoints.save(dict(self.model.named_parameters()), tensors, state)
            self.saved_step = self.step
            if saved:
                self.log.say(f"saved {saved}")
        except CheckpointError as error:
            self.log.say(f"{error}; training goes on, earlier checkpoints are untouched")

    def publish(self, wait: bool) -> None:
        """Publish the checkpoint that is being written in the background, once every rank has written its part."""
        try:
            if saved := self.checkpoints.finish() if wait else self.checkpoints.poll():
                self.log.say(f"saved {saved}")
        except CheckpointError as error:
            self.saved_step = -1
            self.log.say(f"{error}; training goes on, earlier checkpoints are untouched")

    def finish(self) -> None:
        """Log and save the last step. Raises CheckpointError if that is not possible."""
        self.guard.check()
        self.log_step()
        with self.meter.excluded():
            if self.saved_step != self.step:
                self.save()
            self.publish(wait=True)
        if self.saved_step != self.step:
            raise CheckpointError(f"the run stops at step {self.step} without its last checkpoint; see above")

    @torch.no_grad()
    def bad_samples(self, step: int) -> str:
        """The sequences of a step's batch whose loss is not finite."""

        def loss_of(row: Tensor) -> Tensor:
            with self.autocast:
                return self.model(*to_device(row[None], self.world.device))

        bad = [name for names in self.world.gather(self.loader.bad_samples(step, loss_of)) for name in names]
        return ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "") if bad else "none by itself"


def train(t: Trainer) -> None:
    """Run steps until the budget is spent or somebody asks to stop."""
    stop = StopRequest(t.world)
    try:
        if t.due(t.run.eval_every) and t.val_loss is None:  # the evaluation was cut short by a stop request
            t.evaluate_if_due(stop)
            t.saved_step = -1
        while t.step < t.steps and not stop.agreed():
            batch = t.next_batch()
            lr = t.set_rates()
            loss, norm = t.gradients(batch)
            t.update()
            t.log_if_due(loss, norm, lr)
            t.evaluate_if_due(stop)
            t.save_if_due()
        t.finish()
    except Exception as error:
        if t.world.size == 1 or isinstance(error, NonFiniteError):  # all ranks are here: none waits for another
            t.publish(wait=True)
        raise
    finally:
        t.batches.close()
        stop.close()
    if t.step < t.steps:
        t.log.say(f"stopped at step {t.step} of {t.steps}; the same command continues the run")


def train_run(run: RunConfig, world: World, fresh: bool) -> None:
    """Build the parts, train, and say how it ended."""
    t = Trainer(run, world, fresh)
    console.introduce(t)
    try:
        with collector_paused():
            train(t)
    except NonFiniteError as error:
        samples = f"; sequences: {t.bad_samples(error.step)}" if error.step >= 0 else ""
        raise NonFiniteError(f"{error}{samples}") from None
    finally:
        t.log.close()
    if world.is_main:
        try:
            t.log.say(f"curves  {plot_run(t.folder)}")
        except (ImportError, ValueError, OSError) as error:
            t.log.say(f"no curves: {error}")
        if t.step == t.steps and t.val_loss is not None:
            bits = console.bits_per_byte(t.val_loss, t.bytes_per_token) if t.bytes_per_token else None
            t.log.say(f"final   {console.loss_text(t.val_loss, bits)}")
        t.log.say(f"run     {t.folder}")


def arguments() -> Parser:
    """The flags of the trainer; everything else is a key of the config."""
    usage = "train_gpt.py CONFIG [--key=value ...] [flags]"
    parser = Parser(prog="train_gpt", usage=usage, description=__doc__, add_help=False)
    parser.add_argument("config", nargs="*", help="a config file, for example config/quickstart.py")
    parser.add_argument("--help", "-h", action="store_true", help="list every key of CONFIG with its value")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run folder is renamed and kept")
    parser.add_argument("--as_published", action="store_true", help="set what the official runs of the papers did")
    parser.add_argument("--preflight", action="store_true", help="report memory, disk, data, time, network, and stop")
    parser.add_argument("--verify", action="store_true", help="with --preflight: hash every shard, too")
    parser.add_argument("--tokens_per_s", help="with --preflight: the speed to compute the time from")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    flags = [name for a in parser._actions if a.nargs == 0 for name in a.option_strings]
    args, overrides = parser.parse_known_args(join_values(sys.argv[1:] if argv is None else argv, flags))
    if not args.config:
        sys.exit(parser.format_help())
    interrupted = "interrupted; the checkpoints so far are untouched, and the same command continues"
    with one_line("train_gpt", interrupted, "use a smaller --micro_batch or model"):
        if len(args.config) > 1:
            raise ConfigError([f"{' '.join(args.config)}: expected one config file, and settings as --key=value"])
        run = load_config(args.config[0], overrides, args.as_published)
        if args.help:
            print(f"{parser.format_help()}\nkeys, as {args.config[0]} sets them:\n{describe_keys(run)}")
            return
        if not args.preflight and (args.verify or args.tokens_per_s):
            raise ConfigError(["--tokens_per_s=N and --verify: belong to --preflight; give that, too"])
        with torch_settings(run.compute), start_world(run.device) as world:
            if args.preflight:
                preflight(run, world, args.verify, args.tokens_per_s)
                return
            with run_lock(Path(run.log.folder) / run.name, world):
                train_run(run, world, args.fresh)


if __name__ == "__main__":
    main()
