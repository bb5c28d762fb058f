"""The single parts of a training step on one GPU: loss, attention, Newton-Schulz, optimizers.

python -m bench.parts                            all four, minutes
python -m bench.parts loss attention --sizes 124M  some of them
python -m bench.parts --smoke                    tiny shapes on the CPU, seconds
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import mars_m_by_tensor
from bench.report import bench_parser
from bench.runs import split_parameters
from bench.timing import SIZES, TINY, Session, compiler, shape_of
from model import GPT, GPTConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig, Settings, build_optimizer
from optimizers.cohorts import BATCH
from optimizers.newton_schulz import newton_schulz_dtype, orthogonalize
from optimizers.standalone.mars_m import newton_schulz
from runtime.command import one_line
from runtime.hardware import memory_gb
from training.compute import fused_loss_on

TOKENS = 32 * 1024
BYTES = {  # bytes moved per parameter, of a matrix and of the rest, if each tensor is read or written only once
    "AdamW fused (torch)": (28, 28),
    "MARS": (44, 44),  # includes the pass that computes the norm of each tensor for clipping
    "MARS-M": (40, 28),
    "Muon": (24, 28),
    "MARS-M tensor by tensor": (92, 92),
}


def bench_loss(s: Session, size: str, c: GPTConfig) -> None:
    """Output layer and loss of 32 k tokens, forward and backward.

    The first row has the three matrix products alone. What a later row takes beyond it is the price of the loss.
    """
    n, d, v = 256 if s.smoke else TOKENS, c.n_embd, c.padded_vocab_size
    targets = torch.randint(v, (n,), device=s.device)

    def products() -> dict:
        x, w, dy = s.randn(n, d), s.randn(v, d), s.randn(n, v)
        seconds = s.seconds(lambda: (F.linear(x, w), dy @ w, dy.mT @ x))
        return dict(ms=1e3 * seconds, tflops=6e-12 * n * d * v / seconds)

    def measure(make: Callable[[], Callable], compiled: bool) -> dict:
        loss_of = torch.compile(make(), fullgraph=True, dynamic=False) if compiled else make()
        torch.manual_seed(0)
        x, w = s.randn(n, d).requires_grad_(), (s.randn(v, d) * 0.02).requires_grad_()

        def step() -> Tensor:
            x.grad = w.grad = None
            loss = loss_of(x, w)
            loss.backward()
            return loss.detach()

        if s.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        numbers = dict(ms=1e3 * s.seconds(step), memory_gb=memory_gb(s.device))
        loss = step().item()
        return numbers | dict(loss=loss, grad_norm=0.0 if w.grad is None else w.grad.norm().item())

    def plain() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets)

    def fused() -> Callable[[Tensor, Tensor], Tensor]:
        loss = fused_loss_on(s.device)
        return lambda x, w: loss(x, w, targets, v)

    names: dict[str, Any] = dict(part="loss", size=size)
    s.row(products, **names, what="three products alone")
    for what, make in (("float32 loss of bf16 logits", plain), ("the same by compute.fused_loss", fused)):
        s.row(partial(measure, make, True), **names, what=f"{what}, compiled, as in training")
        s.row(partial(measure, make, False), **names, what=f"{what}, not compiled")


def bench_attention(s: Session, size: str, c: GPTConfig) -> None:
    """Causal attention of 32 sequences, forward and backward. FLOPs include what flash attention computes twice."""
    B, T, H, D = 2 if s.smoke else 32, c.block_size, c.n_head, c.n_embd // c.n_head
    attend = partial(F.scaled_dot_product_attention, is_causal=True)

    def measure(backend: SDPBackend) -> dict:
        q, k, v, dy = (s.randn(B, T, H, D).transpose(1, 2) for _ in range(4))  # strides as in the model
        with sdpa_kernel(backend):
            with torch.no_grad():
                forward = s.seconds(lambda: attend(q, k, v))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            seconds = s.seconds(lambda: torch.autograd.grad(attend(q, k, v), leaves, dy))
        return dict(ms=1e3 * seconds, forward_ms=1e3 * forward, tflops=7e-12 * B * T * T * H * D / seconds)

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        s.row(partial(measure, backend), 30, part="attention", size=size, what=backend.name)


def matrix_shapes(c: GPTConfig) -> list[tuple[int, int, int]]:
    """(count, m, n) of the matrices of all layers, m <= n: qkv, attention output, and both of the MLP."""
    d = c.n_embd
    return [(c.n_layer, d, 3 * d), (c.n_layer, d, d), (2 * c.n_layer, d, 4 * d)]


def newton_schulz_flops(c: GPTConfig) -> float:
    """FLOPs of five iterations on all matrices: 20 m^2 n + 10 m^3 for each."""
    return sum(count * (20.0 * m * m * n + 10.0 * m**3) for count, m, n in matrix_shapes(c))


def in_stacks(stacks: Iterable[Tensor]) -> None:
    """The project's Newton-Schulz, in the same batches as in an optimizer step on a GPU."""
    for stack in stacks:
        for batch in stack.split(max(1, BATCH // stack[0].numel())):
            orthogonalize(batch, dtype=newton_schulz_dtype("auto", stack.device))


def one_by_one(stacks: Iterable[Tensor]) -> None:
    """Newton-Schulz as its formula reads, matrix by matrix."""
    for stack in stacks:
        for matrix in stack:
            newton_schulz(matrix)


def bench_newton_schulz(s: Session, size: str, c: GPTConfig) -> None:
    """Newton-Schulz on every matrix of the model, as in each step."""

    def measure(function: Callable[[list[Tensor]], None]) -> dict:
        stacks = [s.randn(*shape, dtype=torch.float32) for shape in matrix_shapes(c)]
        seconds = s.seconds(lambda: function(stacks))
        return dict(ms=1e3 * seconds, tflops=1e-12 * newton_schulz_flops(c) / seconds)

    for what, function in (("matrix by matrix", one_by_one), ("in stacks, as in training", in_stacks)):
        s.row(partial(measure, function), part="newton_schulz", size=size, what=what)


def bench_optimizers(s: Session, size: str, c: GPTConfig) -> None:
    """Optimizer steps on given gradients, beside floor_ms.

    That is the time to move the necessary bytes at the speed of a copy, which the first row has. Newton-Schulz comes
    on top of it.
    """
    names: dict[str, Any] = dict(part="optimizers", size=size)

    def measure_copy() -> dict:
        a, b = (s.randn(1 << (18 if s.smoke else 28), dtype=torch.float32) for _ in range(2))
        return dict(copy_tb_s=2e-12 * a.nbytes / s.seconds(lambda: b.copy_(a)))

    copy = s.row(measure_copy, **names, what="copy").get("copy_tb_s", torch.nan)
    with torch.device(s.device):
        model = GPT(c)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    parts = split_parameters(model)

    def own(config: Settings) -> Callable:
        return build_optimizer(model, config, compiled=not s.smoke).step

    sides = {
        "AdamW fused (torch)": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
        "MARS": lambda: own(MARSConfig()),
        "MARS-M": lambda: own(MARSMConfig()),
        "Muon": lambda: own(MuonConfig()),
        "MARS-M tensor by tensor": lambda: mars_m_by_tensor(*parts),
    }

    def measure(name: str) -> dict:
        moved = sum(n * sum(p.numel() for p in part) for n, part in zip(BYTES[name], parts, strict=True))
        return dict(ms=1e3 * s.seconds(sides[name]()), floor_ms=1e-9 * moved / copy)

    for name in sides:
        s.row(partial(measure, name), 90, **names, what=name)


PARTS = {
    "loss": bench_loss,
    "attention": bench_attention,
    "newton_schulz": bench_newton_schulz,
    "optimizers": bench_optimizers,
}


@one_line("bench.parts")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("parts", __doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124M", "1558M"])
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; the parts are {', '.join(PARTS)}")
    session = Session("_".join(["parts", *args.parts, *args.sizes]), args)
    with compiler(args.smoke):
        for part in args.parts or PARTS:
            for size in ["tiny"] if args.smoke else args.sizes:
                PARTS[part](session, size, TINY if args.smoke else shape_of(size))
    session.report.table(by="part")


if __name__ == "__main__":
    main()
