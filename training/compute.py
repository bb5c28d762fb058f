"""How a run computes: settings of speed, memory and rounding. They may change when a run is resumed."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from optimizers.options import errors_of, option
from runtime.distributed import signals_ignored
from runtime.errors import UserError
from runtime.hardware import cores

# The backends that are enabled for each setting of attention. On Hopper and Blackwell GPUs, torch prefers cuDNN
# whatever order is set. So a setting that must not use cuDNN has to disable it.
BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # environment variable


@dataclass(frozen=True)
class ComputeConfig:
    """Settings that trade speed, memory and rounding; the defaults round least."""

    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = option(
        "auto", "attention kernel to prefer; auto: flash (cuDNN's gradients are not compared yet)", on_resume="free"
    )
    residual: Literal["float32", "bfloat16"] = option(
        "float32", "dtype of the residual stream; bfloat16 is faster and needs bf16 autocast", on_resume="free"
    )
    activation_checkpointing: bool = option(
        False, "keep only block inputs and compute blocks again: less memory, a third more work", on_resume="free"
    )
    cast_weights: Literal["micro_batch", "step"] = option(
        "micro_batch", "cast matrices to bf16 in every pass, or once a step: 2 bytes more per weight", on_resume="free"
    )
    fused_loss: bool = option(
        False, "compute loss and gradient of the logits by one Triton kernel; needs a GPU and bf16", on_resume="free"
    )
    shard: Literal["none", "full", "hybrid"] = option(
        "none",
        "divide weights, gradients and optimizer state over all processes (full) or those of a machine (hybrid)",
        on_resume="free",
    )
    bucket_mb: int = option(0, "MB per all-reduce of gradients; 0: a tenth, at least 25", least=0, on_resume="free")
    deterministic: bool = option(False, "bit-exact results on a GPU; slower, without cuDNN attention", on_resume="free")

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        out = errors_of(self)
        if self.deterministic and self.attention == "cudnn":
            out.append('attention="cudnn": its gradients are not deterministic; use "flash", or deterministic=false')
        if self.shard != "none" and self.cast_weights == "step":
            out.append(f'shard="{self.shard}": keeps no bfloat16 copies of the weights; leave out cast_weights="step"')
        return out


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """bf16 autocast if `wants_bf16`; else a context that changes nothing."""
    if dtype == "bfloat16" and device.type == "cpu":
        print("dtype=bfloat16 on a CPU: many CPUs emulate it, 100 times slower than float32", file=sys.stderr)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wants_bf16(dtype, device))


def wants_bf16(choice: str, device: torch.device) -> bool:
    """Whether to compute in bf16; "auto": on a GPU that supports it."""
    if choice == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return choice == "bfloat16"


def wants_compile(choice: str, device: torch.device) -> bool:
    """Whether to compile the model, in one graph with its loss, and the optimizer; "auto": on a GPU."""
    return device.type == "cuda" if choice == "auto" else choice == "true"


def start_compile_workers(local_size: int) -> None:
    """Start Inductor's workers so that they ignore the signals that stop a run; see `signals_ignored`.

    local_size: processes of the run on this machine. They divide its cores among their workers, of which Inductor
    would otherwise start up to 32 each. Raises UserError if there is no C compiler, which every backend needs.
    """
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import AsyncCompile

    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++"), "cc", "clang"))):
        raise UserError("compilation needs a C compiler, and there is none: install gcc, or give --compile=false")
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        most = cores()
        inductor.compile_threads = max(1, min(inductor.compile_threads or most, most // local_size))
    with signals_ignored():
        AsyncCompile.warm_pool()


def attention_backends(config: ComputeConfig) -> list[SDPBackend]:
    """The attention backends that may run, preferred ones first.

    On Hopper and Blackwell GPUs torch would select cuDNN. There are open reports that its gradients are not
    finite, so "auto" leaves it out until it has been compared with flash on such a GPU.
    """
    return BACKENDS["flash" if config.attention == "auto" else config.attention]


def attention_kernel(heads: int, width: int, context: int, dropout: float, dtype: str, device: torch.device) -> str:
    """The backend that torch selects for attention under the present settings: cudnn, flash, efficient or math."""
    kind = torch.bfloat16 if wants_bf16(dtype, device) else torch.float32
    qkv = torch.empty((1, context, 3, heads, width // heads), dtype=kind, device=device, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # as the model computes them
    chosen = torch._fused_sdp_choice(q, k, v, None, dropout, True)  # no mask; causal
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()


@contextmanager
def torch_settings(config: ComputeConfig) -> Iterator[None]:
    """Apply the settings that torch keeps per process, and restore the previous ones at the end.

    Must be entered before CUDA starts. The forward pass selects the attention backend, and the backward pass uses
    the same one. A compiled graph keeps the backend of its compilation. The key of the compile cache on disk does not
    contain the backend (pytorch/pytorch#185449), so a tag adds it.
    """
    with ExitStack() as stack:
        backends = attention_backends(config)
        stack.enter_context(sdpa_kernel(backends, set_priority=True))
        tag = f"{torch.compiler.config.cache_key_tag} attention={','.join(b.name for b in backends)}"
        stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]
        if config.deterministic:
            _allow_only_deterministic_kernels(stack)
        yield


def _allow_only_deterministic_kernels(stack: ExitStack) -> None:
    """Allow only kernels that add in a fixed order, until the stack is closed.

    torch's switch applies to Inductor, too. Inductor then selects no kernel by timing, and sums the gradient of the
    token table in order instead of by atomic additions. cuBLAS needs a fixed workspace, set before it starts.
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(torch.use_deterministic_algorithms, before, warn_only=warn)
    torch.use_deterministic_algorithms(True)
    stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    torch.backends.cudnn.benchmark = False
    if CUBLAS_WORKSPACE not in os.environ:
        stack.callback(os.environ.pop, CUBLAS_WORKSPACE)
        os.environ[CUBLAS_WORKSPACE] = ":4096:8"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Switch automatic garbage collection off. Explicit collections inside skip the objects that exist at the start.

    If the caller had frozen objects before, they stay frozen.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def apply_compute(model: Any, config: ComputeConfig, bf16: bool) -> None:
    """Apply the settings that are attributes of a GPT. bf16: whether it computes under bf16 autocast.

    Raises UserError for a setting that needs bf16 in a float32 run.
    """
    for key, value in (("residual", "bfloat16"), ("cast_weights", "step"), ("fused_loss", True)):
        if getattr(config, key) == value and not bf16:
            raise UserError(f"compute.{key}={value}: this run computes in float32; set --dtype=bfloat16 as well")
    # layer norms compute in float32 for any input, and each branch ends in bf16 under autocast
    model.residual_dtype = torch.bfloat16 if config.residual == "bfloat16" else None
    model.recompute_blocks = config.activation_checkpointing
    if config.fused_loss:
        model.fused_loss = fused_loss_on(next(model.parameters()).device)


def fused_loss_on(device: torch.device) -> Any:
    """The loss function that uses the Triton kernel. Raises UserError if the kernel cannot run here."""
    if device.type == "cpu":
        raise UserError("compute.fused_loss=true: needs a GPU; leave this setting out")
    try:
        from training.fused_loss import fused_loss
    except ImportError:
        raise UserError(
            "compute.fused_loss=true: Triton is not installed (pip install triton); or leave it out"
        ) from None
    return fused_loss


class _ForwardCopy(torch.autograd.Function):
    """Uses a weight's copy in the forward pass, and gives the gradient to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


class _CastLinear(nn.Linear):
    """A linear layer that multiplies with `cast`, a bf16 copy of its weight."""

    cast: Tensor  # not a buffer, because checkpoints and DDP would include buffers

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _ForwardCopy.apply(self.weight, self.cast), self.bias)


def cast_per_step(model: nn.Module, optimizer: Optimizer) -> None:
    """Let linear layers keep bf16 copies of their weights. They are refreshed when weights are updated or loaded.

    The results equal those of autocast, which casts in every forward pass, bit for bit. The token table has no copy,
    because the embedding reads it in float32.
    """
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in layers:
        layer.__class__, layer.cast = _CastLinear, layer.weight.detach().bfloat16()

    @torch.no_grad()
    def refresh(*_: object) -> None:
        for layer in layers:
            layer.cast.copy_(layer.weight)

    optimizer.register_step_post_hook(refresh)
    model.register_load_state_dict_post_hook(refresh)


def bucket_size(model: nn.Module, config: ComputeConfig) -> int:
    """Megabytes (2^20 bytes) of gradients in one all-reduce of DDP."""
    return config.bucket_mb or max(25, sum(p.numel() * p.element_size() for p in model.parameters()) // (10 << 20))
