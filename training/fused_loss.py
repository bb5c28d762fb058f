"""The output layer and its loss with one Triton kernel, which reads the logits twice and needs no second buffer.

Without it, the forward pass reads the logits (bf16, N x P) to sum up their softmax, and the backward pass reads them
again and writes their gradient. Here the forward pass already overwrites the logits with the gradient of their row's
loss, softmax(z) - onehot(target), as llm.c does (Karpathy et al. 2024), and the backward pass only multiplies it. Sums
are in float32. The number of targets divides the products, in float32: in bf16, most of a gradient would be rounded in
the same direction.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 4096  # logits that a program works on at a time
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)  # exp2 and log2 are the fast ones


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # torch copies this text into modules without other names
    logits,
    targets,
    losses,
    vocab_size: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """One row of `width` logits, the last ones padding: its loss, and the loss's gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)  # more than 2^31 logits need 64 bits
    z, target, columns = logits + row * width, tl.load(targets + row), tl.arange(0, block)
    counts = target >= 0
    at_target = tl.load(z + tl.maximum(target, 0)).to(tl.float32) * LOG2E
    top, total = tl.full([block], float("-inf"), tl.float32), tl.zeros([block], tl.float32)
    for start in range(0, vocab_size, block):  # each lane keeps its own maximum, and the sum relative to it
        x = tl.load(z + start + columns, mask=start + columns < vocab_size, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.maximum(top, x)
        total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    tl.store(losses + row, tl.where(counts, (log_sum - at_target) * LN2, 0.0))
    for start in range(0, width, block):
        at = start + columns
        x = tl.load(z + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32) * LOG2E
        gradient = tl.exp2(x - log_sum) - tl.where(at == target, 1.0, 0.0)
        tl.store(z + at, tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty), mask=at < width)


@triton_op("gpt2_training::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Losses (N,) of logits (N, P) in nats, 0 for the target -1; the logits become the gradient of their row's loss.

    Columns from vocab_size on do not count, and their gradient is 0.
    """
    losses = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, 1 << (vocab_size.bit_length() - 1))  # so that every lane has a logit
    kernel = wrap_triton(_kernel)
    kernel[(logits.size(0),)](logits, targets, losses, vocab_size, logits.size(1), block, num_warps=8)
    return losses


class FusedLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden weight^T`: hidden (N, C) and weight (P, C) of one dtype, targets (N,) int64.

    The loss is the mean over the targets that are not -1, in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = hidden @ weight.T
        count = (targets >= 0).sum(dtype=torch.float32)
        losses = cross_entropy_(logits, targets, vocab_size)
        ctx.save_for_backward(hidden, weight, logits, count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, gradient, count = ctx.saved_tensors
        of_hidden, of_weight = (x.float() * (factor / count) for x in (gradient @ weight, gradient.T @ hidden))
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The mean loss in nats, with products in bf16 as under autocast. hidden: (N, C). weight: (P, C)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return FusedLoss.apply(hidden.bfloat16(), weight.bfloat16(), targets, vocab_size)
