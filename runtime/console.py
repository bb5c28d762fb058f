"""The text that a run prints: its settings at the start, a line per logged step, a line per evaluation."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from config.load import short_count
from data.tokenizer import text_problem
from optimizers.roles import folded, update_table
from optimizers.state import state_bytes
from runtime import compute
from runtime.files import write_durably
from runtime.plot import plot_run

if TYPE_CHECKING:
    from train_gpt import Trainer

HEADER = ("tensor", "shape", "optimizer: gradient x direction", "lr", "decay")


def introduce(t: "Trainer") -> None:
    """Print the settings of the run and how every tensor is updated; parameters.txt has the full table."""
    run, c = t.run, t.run.model
    chosen = f"  chosen     {t.chosen}\n" if t.chosen else ""
    problem = text_problem(t.tokenizer, c.vocab_size)
    tokenizer = f"  tokenizer  {problem}\n" if problem else ""
    dtype = torch.bfloat16 if compute.wants_bf16(run.dtype, t.world.device) else torch.float32
    shape = (1, c.block_size, 3, c.n_head, c.n_embd // c.n_head)
    qkv = torch.empty(shape, dtype=dtype, device=t.world.device, requires_grad=True)
    t.log.say(
        f"{run.name}\n"
        f"  model      {t.model.num_params():,} parameters: {c.n_layer} layers x {c.n_embd}, context {c.block_size}\n"
        f"  data       {run.data.path}: {t.loader.epochs(t.total_sequences):.2f} epochs of "
        f"{len(t.loader.windows):,} windows, {run.data.sampling}\n{tokenizer}"
        f"  batch      {run.sequences} sequences = {t.world.size} processes x {t.micro_batch} x "
        f"{t.accumulation} accumulated = {run.tokens_per_step:,} tokens\n"
        f"{chosen}"
        f"  budget     {t.steps:,} steps = {t.total_sequences * c.block_size:,} tokens\n"
        f"  optimizer  {run.optimizer}: {run.optim}\n"
        f"  state      {state_bytes(t.optimizer) / 1e6:,.1f} MB of optimizer state in this process\n"
        f"  device     {t.world.device}, {run.compute}\n"
        f"  attention  {compute.attention_kernel(qkv, c.dropout)}\n"
        f"  folder     {t.folder}"
    )
    rows = update_table(t.optimizer, {p: name for name, p in t.model.named_parameters()})
    if t.world.is_main:
        table = "".join("\t".join(row) + "\n" for row in (HEADER, *rows))
        write_durably(t.folder / "parameters.txt", table.encode())
    for line in aligned([HEADER, *folded(rows)]):
        t.log.say(line)
    if t.step:
        t.log.say(f"continuing at step {t.step}")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of an update table as lines. Each column is as wide as its longest entry."""
    name, shape, rule, lr, decay = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"  {r[0]:{name}} {r[1]:>{shape}}  {r[2]:{rule}} {r[3]:>{lr}} {r[4]:>{decay}}" for r in rows]


def conclude(t: "Trainer") -> None:
    """Draw the curves of a finished run, and say where its results are."""
    if not t.world.is_main:
        return
    try:
        t.log.say(f"curves  {plot_run(t.folder)}")
    except (ImportError, ValueError, OSError) as error:
        t.log.say(f"no curves: {error}")
    if t.step == t.steps and t.val_loss is not None:
        t.log.say(f"final   {loss_text(t.val_loss, t.evaluator.bits_per_byte(t.val_loss))}")
    t.log.say(f"run     {t.folder}")


def finished(t: "Trainer") -> str:
    """What a start of a finished run prints. It changes no file."""
    loss = loss_text(t.start["val_loss"], t.evaluator.bits_per_byte(t.start["val_loss"]))
    return f"{t.folder} is finished: {t.step} steps, {loss}; --fresh starts over, another --name is another run"


def step_line(numbers: dict, steps: int) -> str:
    """The line of a logged step."""
    step, ms = numbers["step"], numbers["step_ms"]
    mfu = f"  MFU {100 * numbers['mfu']:.1f}%" if "mfu" in numbers else ""
    left = timedelta(seconds=round(ms / 1e3 * (steps - step)))
    return (
        f"step {step:>6}/{steps}  loss {numbers['loss']:.4f}  lr {numbers['lr']:.2e}  norm {numbers['grad_norm']:.3f}"
        f"  {short_count(round(numbers['tokens_per_s']))} tok/s  {ms:.0f} ms{mfu}  left {left}"
    )


def validation_line(numbers: dict) -> str:
    """The line of an evaluation."""
    text = f"step {numbers['step']:>6}  {loss_text(numbers['val_loss'], numbers.get('val_bits_per_byte', math.nan))}"
    if (average := numbers.get("val_loss_average")) is not None:
        text += f", {average:.4f} with averaged weights"
    if "hellaswag_items" in numbers:
        right = 100 * numbers["hellaswag_acc_norm"]
        text += f", {numbers['hellaswag_items']} HellaSwag items {right:.1f}% right"
    return text


def loss_text(loss: float, bits: float) -> str:
    """A validation loss per token and, unless it is NaN, per byte."""
    return f"validation loss {loss:.4f} nats/token" + ("" if math.isnan(bits) else f", {bits:.4f} bits/byte")
