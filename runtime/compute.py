"""How a run computes: settings of speed, memory and rounding. A run may be continued with others."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

BACKENDS = {  # of scaled_dot_product_attention
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CHOICES = {
    "attention": ("auto", *BACKENDS),
    "residual": ("float32", "bfloat16"),
    "cast_weights": ("micro_batch", "step"),
}


def free(default: Any) -> Any:
    """A setting that a continued run may change."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class ComputeConfig:
    """What to trade for what; the defaults are the careful choices. What each buys on a GPU: not measured."""

    attention: str = free("auto")  # tried first: cudnn (Hopper; not bit-exact), flash, efficient, math; auto: torch's
    residual: str = free("float32")  # "bfloat16": half the traffic between blocks, coarser sums; needs bf16 autocast
    activation_checkpointing: bool = free(False)  # far less memory for activations, for a third more computation
    cast_weights: str = free("micro_batch")  # "step": matrices cast to bf16 once a step, for 2 bytes a weight kept
    bucket_mb: int = free(0)  # MB of gradients in an all-reduce: fewer messages, later start; 0: a tenth of them, or 25
    deterministic: bool = free(False)  # bit-exact replay on a GPU too, for slower kernels and attention without cuDNN

    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        out = [
            f'{key}="{getattr(self, key)}": must be one of {", ".join(allowed)}'
            for key, allowed in CHOICES.items()
            if getattr(self, key) not in allowed
        ]
        if self.bucket_mb < 0:
            out.append(f"bucket_mb={self.bucket_mb}: must not be negative (0 chooses)")
        if self.deterministic and self.attention == "cudnn":
            out.append('attention="cudnn": its gradients are not deterministic; use "flash", or deterministic=false')
        return out


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where it is asked for or, with "auto", where the GPU has bf16; no-op otherwise."""
    if dtype == "bfloat16" and device.type == "cpu":
        print("dtype=bfloat16 on a CPU: many CPUs emulate it, 100 times slower than float32", file=sys.stderr)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wants_bf16(dtype, device))


def wants_bf16(choice: str, device: torch.device) -> bool:
    """Whether to compute in bf16; "auto": on a GPU that has it."""
    if choice == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return choice == "bfloat16"


def wants_compile(choice: str, device: torch.device) -> bool:
    """Whether to compile the model, in one graph with its loss, and the optimizer; "auto": on a GPU."""
    return device.type == "cuda" if choice == "auto" else choice == "true"


def attention_order(config: ComputeConfig) -> list[str]:
    """The attention backends to try, in this order; none: torch's own order."""
    first = "flash" if config.deterministic and config.attention == "auto" else config.attention
    if first == "auto":
        return []
    order = [first, *(name for name in BACKENDS if name != first and not (name == "cudnn" and config.deterministic))]
    return order[: order.index("math") + 1]  # math takes everything


@contextmanager
def torch_settings(config: ComputeConfig) -> Iterator[None]:
    """The settings that torch keeps per process, for all that is done inside; put back at the end.

    To be entered before CUDA starts. The backend of attention is chosen in the forward pass, and backward
    follows. A compiled graph keeps the choice of its compilation, on the disk, too, under a key that does
    not tell the backends apart (pytorch/pytorch#185449); the tag does.
    """
    with ExitStack() as stack:
        if order := attention_order(config):
            stack.enter_context(sdpa_kernel([BACKENDS[name] for name in order], set_priority=True))
            tag = f"{torch.compiler.config.cache_key_tag} attention={','.join(order)}"
            stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))
        if config.deterministic:
            stack.enter_context(_deterministic())
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """Only kernels that add in a fixed order.

    torch's switch is inductor's, too: no kernel is then chosen by timing, and the gradient of the token
    table is summed in order instead of by atomic adds. cuBLAS wants a fixed workspace, stated before it starts.
    """
    workspace = "CUBLAS_WORKSPACE_CONFIG"
    given, benchmark = os.environ.get(workspace), torch.backends.cudnn.benchmark
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ[workspace] = given or ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.backends.cudnn.benchmark = benchmark
        if given is None:
            del os.environ[workspace]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector at rest, and what is alive out of its sight: no pauses but those asked for."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def prepare(model: nn.Module, config: ComputeConfig, half: bool) -> None:
    """Apply to a GPT what is to be set there; half: whether it computes under bf16 autocast.

    Raises ValueError for a setting without meaning in float32.
    """
    for key, value in (("residual", "bfloat16"), ("cast_weights", "step")):
        if getattr(config, key) == value and not half:
            raise ValueError(f'compute.{key}="{value}": this run computes in float32; set --dtype=bfloat16 as well')
    # layer norms reckon in float32 whatever they are given, and autocast ends each branch in bf16: so do the sums
    model.residual_dtype = torch.bfloat16 if config.residual == "bfloat16" else None
    model.recompute_blocks = config.activation_checkpointing


class _InPlaceOf(torch.autograd.Function):
    """A weight's copy in its place: the loss depends on the copy, the gradient goes to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


class _CastLinear(nn.Linear):
    """A linear layer that multiplies with `cast`, a bf16 copy of its weight."""

    cast: Tensor  # no buffer: neither checkpoints nor DDP are to see it

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _InPlaceOf.apply(self.weight, self.cast), self.bias)


def cast_per_step(model: nn.Module, optimizer: Optimizer) -> None:
    """Let the linear layers of a model keep bf16 copies of their weights, made anew when these are updated or loaded.

    Bit for bit what autocast computes, which casts them in every forward pass. The token table is not
    among them: as an embedding it is read in float32.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in layers:
        layer.__class__, layer.cast = _CastLinear, layer.weight.detach().bfloat16()

    @torch.no_grad()
    def refresh(*_: object) -> None:
        for layer in layers:
            layer.cast.copy_(layer.weight)

    optimizer.register_step_post_hook(refresh)
    model.register_load_state_dict_post_hook(refresh)


def bucket_size(model: nn.Module, config: ComputeConfig) -> int:
    """Megabytes (2^20 bytes) of gradients that DDP sends at once."""
    return config.bucket_mb or max(25, sum(p.numel() * p.element_size() for p in model.parameters()) // (10 << 20))
