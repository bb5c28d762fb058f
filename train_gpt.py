"""Pretrain a GPT-2.

    python train_gpt.py config/quickstart.py
    torchrun --nproc_per_node=8 train_gpt.py config/gpt2_small.py --optimizer=adamw --seed=2

The same command continues an interrupted run. Any key of the config may follow as --key=value or --key value;
CONFIG --help lists them all.
"""

import gc
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.load import ConfigError, describe_keys, load_config, to_dict
from data.hellaswag import HellaSwag
from data.loader import ReadAhead, TrainLoader, ValidationSet, to_device
from data.shards import DataError, open_dataset
from data.tokenizer import copy_custom, text_problem
from model import GPT
from optimizers import build_optimizer
from optimizers.state import named_state, state_bytes, state_problem
from runtime.command import Parser, one_line
from runtime.distributed import StopRequest, World, start_world
from runtime.errors import UserError
from runtime.hardware import environment, memory_gb, peak_flops, to_host
from training import compute, console, parallel
from training.average import WeightAverage
from training.checkpoint import MODEL, Checkpointer, branch_origin, checkpoint_in, load, start_branch
from training.clipping import GradientClipper, NonFiniteError
from training.evaluation import Evaluator, bad_samples
from training.folder import INIT_SHA256, compare_settings, on_main, run_lock, write_settings
from training.logger import Meter, RunLogger
from training.memory import divisors
from training.plot import plot_run
from training.preflight import fitting_micro_batch, preflight
from training.run_config import RunConfig, changeable_keys, default_values
from training.saving import Saver, replica_warning
from training.schedule import budget_problem, set_rates


class Trainer:
    """The parts of one run, built from its config and from the checkpoint it continues, if there is one.

    Until `begin`, nothing in the run folder is changed, so a wrong setting costs nothing.
    """

    def __init__(self, run: RunConfig, world: World, fresh: bool, accept_changes: bool = False) -> None:
        self.run, self.world = run, world
        run.per_process(world.size)  # raises UserError for a batch that does not divide
        self.dataset = dataset = open_dataset(run.data.path, run.model.vocab_size)
        sizes = dict(block_size=run.model.block_size, vocab_size=run.model.vocab_size, seed=run.seed)
        ranks = dict(rank=world.rank, world_size=world.size)
        self.loader = TrainLoader(dataset, run.data, batch_size=run.sequences, **sizes, **ranks)
        hellaswag = HellaSwag.of_run(run.data, dataset) if run.data.hellaswag else None

        torch.manual_seed(run.seed)
        self.model = GPT(run.model).to(world.device)
        compute.apply_compute(self.model, run.compute, compute.wants_bf16(run.dtype, world.device))
        compiles = compute.wants_compile(run.compile, world.device)
        if compiles:
            compute.start_compile_workers(world.local_size)
        self.shards = parallel.shards(run.compute.shard, world)
        if self.shards > 1:
            parallel.shard(self.model, run.compute.shard, world, compiles)
        group = None if self.shards > 1 else world.group
        self.optimizer = build_optimizer(self.model, run.optim, group, compiles)
        if problem := state_problem(self.optimizer, self.model):
            raise UserError(f"optimizer={run.optimizer}: checkpoints cannot keep its state ({problem})")
        if run.compute.cast_weights == "step":
            compute.cast_per_step(self.model, self.optimizer)
        exact = getattr(self.optimizer, "needs_lookahead", False)  # the exact form of MARS and MARS-M
        self.lookahead: Any = self.optimizer if exact else None
        self.clipper = GradientClipper(self.model, run.grad_clip)

        self.folder, self.fresh = Path(run.log.folder) / run.name, fresh
        self.checkpoints = Checkpointer(self.folder / "checkpoints", run.checkpoint, world)
        self.settings = to_dict(run) | {"dataset": dataset.fingerprint()}
        state = self.restore(accept_changes)
        self.step, self.start = state["step"], state
        self.logged_step = self.step
        self.loader.start_at(self.step, state["sequences"])

        self.autocast = compute.autocast(run.dtype, world.device)
        whole_graph = compiles and self.shards == 1
        self.compiled: Any = torch.compile(self.model, fullgraph=True, dynamic=False) if whole_graph else self.model
        self.forward = parallel.synchronized(self.model, self.compiled, run.compute, world)
        self.divide_batch()
        validation = ValidationSet(dataset, run.data, micro_batch=self.micro_batch, **sizes)
        self.evaluator = Evaluator(self.model, self.compiled, self.autocast, validation, hellaswag, dataset, world)
        # val_loss is None until the present step has been evaluated
        self.val_loss, self.best_val_loss = state.get("val_loss"), state.get("best_val_loss")
        if not self.finished:
            self.val_loss, self.best_val_loss = self.evaluator.comparable_losses(state)

        self.passes = 2 if self.lookahead else 1  # gradient evaluations per step
        flops = self.passes * self.model.flops_per_token() * run.tokens_per_step
        peak = world.size * (peak_flops(world.device) or 0)
        self.unwritten: tuple[dict[str, Any], Callable[[], Tensor]] | None = None  # the record of a step
        self.meter = Meter(state.get("train_seconds", 0.0), run.tokens_per_step, flops, peak)

    def restore(self, accept_changes: bool) -> dict[str, Any]:
        """Load the checkpoint to continue from, if there is one; returns its state.json. Changes no file.

        This is the newest undamaged checkpoint of the run, or the checkpoint that the run branches from. Raises
        UserError on every rank if the run in the folder has other settings.
        """
        run, world, found = self.run, self.world, None
        if not self.fresh:
            if world.is_main:
                self.checkpoints.repair()
            may_change = changeable_keys(run, accept_changes)
            compare_settings(self.folder, self.settings, may_change, default_values(run), world)
            found = self.checkpoints.latest()
        self.continues, self.origin = found is not None, None
        if found is None and run.branch_from:
            self.origin = branch_origin(run.branch_from, world)
            found = checkpoint_in(self.origin)
        if found is None and run.init_from:
            from weights import load_weights  # only --init_from needs the readers of other formats

            self.settings[INIT_SHA256] = load_weights(self.model, run.init_from)
        if found:
            load(found, self.model, self.optimizer, run.optimizer)
        saved = found.average() if found else None
        self.average = WeightAverage(self.model, run.ema, saved) if run.ema else None
        state = found.state if found else dict(step=0, tokens=0, sequences=0)
        self.steps = run.steps_after(state["step"], state["tokens"])
        problem = budget_problem(state, run.schedule, run.optim.lr, self.steps, self.continues) if found else None
        if problem:
            if not accept_changes or state["step"] > self.steps:
                raise UserError(problem)
            world.say(f"note: {problem}")
        return state

    @property
    def finished(self) -> bool:
        """Whether an earlier start has finished this run."""
        return self.continues and self.step == self.steps and self.start.get("val_loss") is not None

    def begin(self) -> None:
        """Write the run folder, and start to read ahead and to log."""
        run, world = self.run, self.world
        facts = environment(world.device, world.size)
        facts |= dict(micro_batch=self.micro_batch, accumulation=self.accumulation)
        write_settings(self.folder, self.settings, facts, self.fresh, world)
        on_main(self.copy_files, self.folder, world)
        self.log = RunLogger(self.folder, run.log, self.settings, run.name, self.steps, self.step, world)
        self.saver = Saver(self.checkpoints, self.step, self.log.say)
        self.batches = ReadAhead(self.loader, self.step, pin=world.device.type == "cuda")
        self.unreadable: DataError | None = None

    def copy_files(self) -> None:
        """Copy a custom tokenizer, and for a branch the checkpoint and metrics of its origin, into the run folder."""
        copy_custom(self.dataset.tokenizer, self.dataset.folder, self.folder)
        if self.origin:
            start_branch(self.origin, self.folder)

    def introduce(self) -> None:
        """Print the settings of the run and how every tensor is updated; parameters.txt has the full table."""
        run, c, world = self.run, self.run.model, self.world
        total = self.sequences + (self.steps - self.step) * run.sequences
        epochs, windows = f"{self.loader.epochs(total):.2f} epochs", f"{len(self.loader.windows):,} windows"
        split = f"{world.size} processes x {self.micro_batch} x {self.accumulation} accumulated"
        facts = {
            "model": f"{self.model.num_params():,} parameters: {c.n_layer} layers x {c.n_embd}, context {c.block_size}",
            "data": f"{run.data.path}: {epochs} of {windows}, {run.data.sampling}",
            "tokenizer": text_problem(self.dataset.tokenizer, c.vocab_size),
            "batch": f"{run.sequences} sequences = {split} = {run.tokens_per_step:,} tokens",
            "chosen": self.chosen,
            "budget": f"{self.steps:,} steps = {total * c.block_size:,} tokens",
            "shard": parallel.description(run.compute.shard, world),
            "optimizer": f"{run.optimizer}: {run.optim}",
            "state": f"{state_bytes(self.optimizer) / 1e6:,.1f} MB of optimizer state in this process",
            "device": f"{world.device}, {run.compute}",
            "attention": compute.attention_kernel(c.n_head, c.n_embd, c.block_size, c.dropout, run.dtype, world.device),
            "folder": self.folder,
        }
        lines = [run.name, *(f"  {name:10} {fact}" for name, fact in facts.items() if fact)]
        lines += console.update_lines(self.optimizer, self.model)
        self.log.say("\n".join(lines + ([f"continuing at step {self.step}"] if self.step else [])))
        if world.is_main:
            console.write_update_table(self.optimizer, self.model, self.folder / "parameters.txt")

    def conclude(self) -> None:
        """Draw the curves of a run that has ended, and say where its results are."""
        if not self.world.is_main:
            return
        try:
            self.log.say(f"curves  {plot_run(self.folder)}")
        except (UserError, OSError) as error:
            self.log.say(f"no curves: {error}")
        if self.step == self.steps and self.val_loss is not None:
            self.log.say(f"final   {console.loss_text(self.val_loss, self.evaluator.bits_per_byte(self.val_loss))}")
        self.log.say(f"run     {self.folder}")

    def bad_samples(self, step: int) -> str:
        """The sequences of a step whose loss is not finite, as the end of the message of a NonFiniteError."""
        saved = partial(self.checkpoints.latest, {MODEL})
        return f"; sequences: {bad_samples(self.loader, step, self.model, self.autocast, self.world, saved)}"

    @property
    def tokens(self) -> int:
        """Training tokens so far."""
        return self.start["tokens"] + (self.step - self.start["step"]) * self.run.tokens_per_step

    @property
    def sequences(self) -> int:
        """Training sequences so far: the position in the order of the data."""
        return self.start["sequences"] + (self.step - self.start["step"]) * self.run.sequences

    def divide_batch(self) -> None:
        """Choose the micro-batch, and the number of micro-batches that this process accumulates per step."""
        run, sequences = self.run, self.run.per_process(self.world.size)

        def loss(micro_batch: int) -> Tensor:
            tokens = torch.zeros(micro_batch, run.model.block_size + 1, dtype=torch.uint16)
            with parallel.unsynchronized(self.forward), self.autocast:
                return self.forward(*to_device(tokens, self.world.device))

        self.chosen = None
        if run.micro_batch is None and not self.finished:
            self.chosen = fitting_micro_batch(run, self.model, self.optimizer, self.world, loss)
        self.micro_batch = self.chosen.size if self.chosen else divisors(sequences, run.micro_batch or 1)[0]
        self.accumulation = sequences // self.micro_batch

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return self.step > 0 and (self.step == self.steps or self.step % every == 0)

    # ---- one step

    def next_batch(self) -> Any:
        """This rank's part of the step's batch, (sequences, block_size + 1) uint16.

        If it cannot be read, or one of the next two cannot, `unreadable` says why. Stopping takes two steps, because
        the ranks learn of each other's errors one step late.
        """
        with self.meter.waiting():
            batch, self.following_batch = self.batches.take()
        self.unreadable = self.batches.error(needed=self.steps - self.step + self.passes - 1)
        return batch

    def set_rates(self) -> None:
        """Set the learning rate and the other hyperparameters that change from step to step."""
        run = self.run
        self.lr = set_rates(self.optimizer, run.optim, run.schedule, run.moves, self.step, self.steps)

    def gradients(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Compute and clip the gradients of a batch; returns this rank's mean loss and the norm before clipping."""
        if self.lookahead:  # the exact form first needs the next batch's gradient at the present weights
            self.accumulate(self.following_batch, self.step + 1)
            self.clipper.clip(self.step + 1)
            self.lookahead.update_previous_grad()
            parallel.clear_gradients(self.forward, self.optimizer)
        loss, norm = self.accumulate(batch, self.step), self.clipper.clip(self.step)
        return loss, norm

    def accumulate(self, batch: Tensor, step: int) -> Tensor:
        """Gradients of the mean loss over a step's batch, averaged over ranks; returns this rank's mean loss."""
        # the seed depends on step and rank, so a resumed run draws the same dropout without saving generator states
        torch.manual_seed(self.run.seed + 1_000_003 * (step + 1) + 7919 * self.world.rank)
        total = torch.zeros((), device=self.world.device)
        for i, part in enumerate(batch.split(self.micro_batch)):
            with nullcontext() if i == self.accumulation - 1 else parallel.unsynchronized(self.forward):
                with self.autocast:
                    loss = self.forward(*to_device(part, self.world.device))
                (loss * (self.run.grad_multiple / self.accumulation)).backward()
            total += loss.detach() / self.accumulation
        return total

    def update(self) -> None:
        """Update the weights and drop the gradients."""
        self.optimizer.step()
        parallel.clear_gradients(self.forward, self.optimizer)
        if self.lookahead:
            self.lookahead.update_last_grad()
        self.step, self.val_loss = self.step + 1, None
        self.meter.step_done()
        if self.average:
            self.average.update(self.step)

    # ---- between steps

    def log_if_due(self, loss: Tensor, norm: Tensor) -> None:
        """Log the step; on a GPU, its record is written one step later, so that the host does not wait for the device.

        Before anything is logged, evaluated or saved, check that all gradients were finite.
        """
        self.write_record()  # of the previous step: by now `clip` has checked its norm
        self.last_loss, self.last_norm = loss, norm
        if self.due(self.run.log.every):
            self.log_step()
        if not self.clipper.late or any(map(self.due, (self.run.eval_every, *self.run.checkpoint.intervals))):
            self.clipper.check()
            self.write_record()

    def log_step(self) -> None:
        """Measure the last step, unless this was done already; times are means over the steps since the last log."""
        if self.logged_step == self.step:
            return
        loss = self.world.sum(self.last_loss.clone()) / self.world.size
        numbers = dict(step=self.step, tokens=self.tokens, loss=math.nan, lr=self.lr, grad_norm=math.nan)
        numbers |= dict(gradient_evaluations=self.step * self.passes) | self.meter.read(self.step - self.logged_step)
        numbers |= dict(memory_gb=memory_gb(self.world.device))
        self.unwritten = numbers, to_host(torch.stack((loss, self.last_norm)))
        self.logged_step = self.step

    def write_record(self) -> None:
        """Write the record that waits, if there is one."""
        if self.unwritten:
            (numbers, measured), self.unwritten = self.unwritten, None
            numbers["loss"], numbers["grad_norm"] = measured().tolist()
            self.log.record(numbers, console.step_line(numbers, self.steps))

    def evaluate_if_due(self, stop: StopRequest) -> bool:
        """Evaluate if it is due and not done yet. Returns False, on every rank, if a stop request interrupted it."""
        if not self.due(self.run.eval_every) or self.val_loss is not None:
            return True
        with self.meter.excluded():
            gc.collect()  # automatic garbage collection is off between evaluations
            number = self.step // self.run.eval_every
            with_hellaswag = number % self.run.data.hellaswag_every == 0 or self.step == self.steps
            average = self.average.averaged if self.average else None
            scores = self.evaluator.scores(self.step, stop, average, with_hellaswag)
            if scores is None:
                return False
            self.val_loss = scores["val_loss"]
            self.best_val_loss = min(x for x in (self.val_loss, self.best_val_loss) if x is not None)
            numbers = dict(step=self.step, tokens=self.tokens) | scores
            self.log.record(numbers | dict(measured_on=self.evaluator.measured_on), console.validation_line(numbers))
        return True

    def save_if_due(self, last: bool = False) -> None:
        """Save a checkpoint if one is due. If that fails, training continues.

        last: the run ends here; save this step in any case, wait for it, and raise CheckpointError if it fails.
        """
        due = self.step < self.steps and any(map(self.due, self.run.checkpoint.intervals))  # `last` saves the last step
        with self.meter.excluded():
            self.saver.after_step(self.step, due, last, self.save)

    def save(self) -> Path | None:
        """Write a checkpoint and return its folder; in the background, start to write it and return None."""
        gc.collect()
        self.log.say(replica_warning(self.model.parameters(), self.world, self.shards))
        state = dict(step=self.step, tokens=self.tokens, sequences=self.sequences, steps=self.steps)
        state |= dict(config=self.settings, measured_on=self.evaluator.measured_on)
        state |= dict(val_loss=self.val_loss, best_val_loss=self.best_val_loss, train_seconds=self.meter.trained)
        state |= dict(processes=self.world.size)
        tokenizer = self.dataset.tokenizer
        if tokenizer and "file" in tokenizer:  # a custom tokenizer; its file is in the run folder
            state["tokenizer"] = tokenizer
        self.log.flush()
        tensors = named_state(self.optimizer, self.model, self.world.rank)
        weights = parallel.gathered(dict(self.model.named_parameters()), self.world.is_main)
        average = parallel.gathered(self.average.averaged, self.world.is_main) if self.average else None
        return self.checkpoints.save(weights, tensors, state, average)


def train(t: Trainer) -> None:
    """Run steps until the budget is spent or somebody asks to stop."""
    stop, goes_on, failed = StopRequest(t.world), True, True
    try:
        if t.due(t.run.eval_every) and t.val_loss is None:  # the evaluation was cut short by a stop request
            t.saver.step = -1
            t.evaluate_if_due(stop)
            stop.let_steps_finish()  # the result is worth saving
        while goes_on and t.step < t.steps:
            batch = t.next_batch()
            if stop.agreed(t.unreadable is not None):
                break
            if isinstance(batch, DataError) or (t.lookahead and isinstance(t.following_batch, DataError)):
                raise t.unreadable or batch  # at its first step, a start has no agreement yet
            t.set_rates()
            loss, norm = t.gradients(batch)
            t.update()
            stop.let_steps_finish()
            t.log_if_due(loss, norm)
            goes_on = t.evaluate_if_due(stop)  # the resumed run repeats what a stop request interrupts
            if goes_on:
                t.save_if_due()
        t.clipper.check()
        t.log_step()
        t.write_record()
        t.save_if_due(last=True)
        failed = False
        t.world.raise_first(t.unreadable)
    except DataError:  # every rank is here, or no step has been taken since the last save
        t.save_if_due(last=True)
        raise
    except Exception as error:
        if t.world.size == 1 or isinstance(error, NonFiniteError):  # every rank is here, so none waits for another
            t.saver.finish()
        raise
    finally:
        t.batches.close()
        stop.close(wait=not failed)
    if t.step < t.steps:
        t.log.say(f"stopped at step {t.step} of {t.steps}; the same command continues the run")


def train_run(run: RunConfig, world: World, fresh: bool, accept_changes: bool) -> None:
    """Build the parts, train, and say how it ended. Raises UserError outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError("training handles signals, which only the main thread can: start it in a process of its own")
    t = Trainer(run, world, fresh, accept_changes)
    if t.finished:
        loss = console.loss_text(t.start["val_loss"], t.evaluator.bits_per_byte(t.start["val_loss"]))
        again = "to train again, give --fresh or another --name"
        world.say(f"{t.folder} is finished: {t.step} steps, {loss}; {again}")
        return
    t.begin()
    t.introduce()
    try:
        with compute.collector_paused():
            train(t)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}{t.bad_samples(error.step) if error.step >= 0 else ''}") from None
    finally:
        t.log.close()
    t.conclude()
    if t.log.lost:
        raise UserError(t.log.lost)


def arguments() -> Parser:
    """The flags of the trainer; everything else is a key of the config."""
    usage = "train_gpt.py CONFIG [--key=value ...] [flags]"
    parser = Parser(prog="train_gpt", usage=usage, description=__doc__, add_help=False)
    parser.add_argument("config", nargs="*", help="a config file, for example config/quickstart.py")
    parser.add_argument("--help", "-h", action="store_true", help="list every key of CONFIG with its value")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run folder is renamed and kept")
    parser.add_argument("--accept_changes", action="store_true", help="accept changed settings, except the model's")
    parser.add_argument("--as_published", action="store_true", help="set what the official runs of the papers did")
    parser.add_argument("--preflight", action="store_true", help="report memory, disk, data, time, network, and stop")
    parser.add_argument("--verify", action="store_true", help="with --preflight: hash every shard, too")
    parser.add_argument("--tokens_per_s", help="with --preflight: the speed to compute the time from")
    parser.add_argument("--as", dest="machines", help="with --preflight: plan for other GPUs, for example 2x8xH100")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args, overrides = parser.parse_with_settings(argv)
    if not args.config:
        if not args.help:
            sys.exit(parser.format_help())
        print(parser.format_help())
        return
    interrupted = "interrupted. Run the same command to resume from the last checkpoint"
    with one_line("train_gpt", interrupted, "use a smaller --micro_batch or model"):
        if len(args.config) > 1:
            raise ConfigError([f"{' '.join(args.config)}: expected one config file, and settings as --key=value"])
        run = load_config(args.config[0], overrides, args.as_published)
        if args.help:
            print(f"{parser.format_help()}\nkeys, as {args.config[0]} sets them:\n{describe_keys(run)}")
            return
        if not args.preflight and (args.verify or args.tokens_per_s or args.machines):
            raise ConfigError(["--tokens_per_s=N, --verify and --as=GPUS: need --preflight; give it as well"])
        with compute.torch_settings(run.compute), start_world(run.device) as world:
            if args.preflight:
                preflight(run, world, args.verify, args.tokens_per_s, args.machines)
                return
            with run_lock(Path(run.log.folder) / run.name, world):
                train_run(run, world, args.fresh, args.accept_changes)


if __name__ == "__main__":
    main()
