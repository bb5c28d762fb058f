"""The single parts of a training step on one GPU: matrix products, attention, loss, Newton-Schulz, optimizers.

python -m bench.micro                       all five, minutes
python -m bench.micro gemm ce --sizes 124M  some of them
python -m bench.micro --smoke               tiny shapes on the CPU, seconds
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.micro_optimizers import bench_ns, bench_optim
from bench.report import bench_parser
from bench.timing import SIZES, TINY, Session, compiled, shape_of
from model import GPTConfig, newest_nn
from runtime.command import one_line
from runtime.hardware import memory_gb

TOKENS = 32 * 1024


def bench_gemm(s: Session, size: str, c: GPTConfig) -> None:
    """Matrix products of 32 k tokens: the forward pass, the gradient of the input (dX) and of the weight (dW)."""
    n, d = 256 if s.smoke else TOKENS, c.n_embd
    layers = {"attn.qkv": (d, 3 * d), "attn.proj": (d, d), "mlp.fc": (d, 4 * d), "mlp.proj": (4 * d, d)}
    layers["lm_head"] = (d, c.padded_vocab_size)
    products = {
        "forward": lambda x, w, dy: F.linear(x, w),
        "dX": lambda x, w, dy: dy @ w,
        "dW": lambda x, w, dy: dy.mT @ x,
    }

    def measure(product: Callable, k: int, m: int) -> dict:
        x, w, dy = s.randn(n, k), s.randn(m, k), s.randn(n, m)
        seconds = s.seconds(lambda: product(x, w, dy))
        return dict(ms=1e3 * seconds, tflops=2e-12 * n * k * m / seconds)

    for layer, (k, m) in layers.items():
        for kind, product in products.items():
            s.row(partial(measure, product, k, m), 20, block="gemm", size=size, what=layer, kind=kind)


def bench_sdpa(s: Session, size: str, c: GPTConfig) -> None:
    """Causal attention of 32 sequences, forward and backward. FLOPs include what flash attention computes twice."""
    B, T, H, D = 2 if s.smoke else 32, c.block_size, c.n_head, c.n_embd // c.n_head

    def measure(attend: Callable) -> dict:
        q, k, v, dy = (s.randn(B, T, H, D).transpose(1, 2) for _ in range(4))  # strides as in the model
        with torch.no_grad():
            forward = s.seconds(lambda: attend(q, k, v))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        seconds = s.seconds(lambda: torch.autograd.grad(attend(q, k, v), leaves, dy))
        return dict(ms=1e3 * seconds, forward_ms=1e3 * forward, tflops=7e-12 * B * T * T * H * D / seconds)

    def fused(backend: str) -> dict:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return measure(partial(F.scaled_dot_product_attention, is_causal=True))

    def flex() -> dict:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=s.device.type)
        return measure(partial(compiled(flex_attention), block_mask=mask))

    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        s.row(partial(fused, backend), 30, block="sdpa", size=size, what=backend)
    s.row(flex, 60, block="sdpa", size=size, what="flex_attention, compiled")


def mean_loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32 of a bf16 output layer. If compiled, no float32 logits are stored."""
    return F.cross_entropy(F.linear(x, w).float(), targets)


def with_backward(loss_of: Callable, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The loss; its gradients are left in x.grad and w.grad."""
    loss = loss_of(x, w, targets)
    loss.backward()
    return loss.detach()


def bench_ce(s: Session, size: str, c: GPTConfig) -> None:
    """Output layer and loss, forward and backward. `loss` and `grad_norm` (of w) show that all variants agree."""
    n, d, v = 256 if s.smoke else TOKENS, c.n_embd, c.padded_vocab_size

    def measure(loss_and_gradients: Callable) -> dict:
        torch.manual_seed(0)
        x, w = s.randn(n, d).requires_grad_(), (s.randn(v, d) * 0.02).requires_grad_()
        targets = torch.randint(v, (n,), device=s.device)

        def step() -> Tensor:
            x.grad = w.grad = None
            return loss_and_gradients(x, w, targets)

        if s.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        numbers = dict(ms=1e3 * s.seconds(step), memory_gb=memory_gb(s.device))
        loss = step().item()
        return numbers | dict(loss=loss, grad_norm=0.0 if w.grad is None else w.grad.norm().item())

    def whole() -> dict:
        return measure(partial(with_backward, compiled(mean_loss)))

    def inductor_chunks(chunks: int) -> dict:
        with inductor.patch({"auto_chunker.enable": True, "auto_chunker.num_chunk": chunks}):
            return whole()

    def torch_chunks(rows: int) -> dict:
        options = newest_nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return measure(partial(with_backward, partial(newest_nn.functional.linear_cross_entropy, options=options)))

    names: dict[str, Any] = dict(block="ce", size=size)
    s.row(whole, **names, what="bf16 logits, compiled")
    s.row(partial(measure, partial(with_backward, mean_loss)), **names, what="fp32 logits, not compiled")
    for chunks in (4, 8):
        s.row(partial(inductor_chunks, chunks), **names, what=f"Inductor's auto-chunker, {chunks} chunks")
    s.row(partial(torch_chunks, n // 4), **names, what=f"torch's linear_cross_entropy, chunks of {n // 4} tokens")


BLOCKS = {"gemm": bench_gemm, "sdpa": bench_sdpa, "ce": bench_ce, "ns": bench_ns, "optim": bench_optim}
ENDS = {"sdpa", "ce", "optim"}  # by default only the smallest and the largest size


@one_line("bench.micro")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("micro", __doc__)
    parser.add_argument("blocks", nargs="*", help=f"any of {', '.join(BLOCKS)}; default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all; sdpa, ce, optim: first and last")
    args = parser.parse_args(argv)
    if unknown := set(args.blocks) - set(BLOCKS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; the blocks are {', '.join(BLOCKS)}")
    session = Session("_".join(["micro", *args.blocks, *(args.sizes or [])]), args)
    for block in args.blocks or BLOCKS:
        sizes = args.sizes or (["124M", "1558M"] if block in ENDS else list(SIZES))
        for size in ["tiny"] if args.smoke else sizes:
            BLOCKS[block](session, size, TINY if args.smoke else shape_of(size))
    session.report.table(by="block")


if __name__ == "__main__":
    main()
