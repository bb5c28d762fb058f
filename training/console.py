"""The text that a run prints: how every tensor is updated, a line per logged step, a line per evaluation."""

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from optimizers.roles import folded, update_table
from runtime.command import short_count
from runtime.files import write_durably

HEADER = ("tensor", "shape", "optimizer: update", "lr", "decay")


def update_lines(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """How every tensor is updated, as lines; equal tensors of different layers share one."""
    rows = update_table(optimizer, {p: name for name, p in model.named_parameters()})
    return aligned([HEADER, *folded(rows)])


def write_update_table(optimizer: Optimizer, model: nn.Module, path: Path) -> None:
    """Write how every tensor is updated, one a line, with tabs between the columns."""
    rows = update_table(optimizer, {p: name for name, p in model.named_parameters()})
    write_durably(path, "".join("\t".join(row) + "\n" for row in (HEADER, *rows)).encode())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of an update table as lines. Each column is as wide as its longest entry."""
    name, shape, rule, lr, decay = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"  {r[0]:{name}} {r[1]:>{shape}}  {r[2]:{rule}} {r[3]:>{lr}} {r[4]:>{decay}}" for r in rows]


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
