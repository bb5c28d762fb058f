"""How a run computes: settings of speed, memory and rounding. A run may be continued with others."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {  # of scaled_dot_product_attention
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CHOICES = {
    "attention": ("auto", *BACKENDS),
    "residual": ("float32", "bfloat16"),
}


def free(default: Any) -> Any:
    """A setting that a continued run may change."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class ComputeConfig:
    """What to trade for what; the defaults are the careful choices. What each buys on a GPU: not measured."""

    attention: str = free(
        "auto"
    )  # kernel tried first: cudnn (Hopper; not bit-exact), flash, efficient, math; auto: torch's
    residual: str = free(
        "float32"
    )  # "bfloat16": half the traffic between blocks, coarser sums; with bf16 autocast only
    activation_checkpointing: bool = free(False)  # far less memory for activations, for a third more computation


    def faults(self) -> list[str]:
        """Everything wrong with this config, a line each."""
        out = [
            f'{key}="{getattr(self, key)}": must be one of {", ".join(allowed)}'
            for key, allowed in CHOICES.items()
            if getattr(self, key) not in allowed
        ]
        return out


def attention_order(config: ComputeConfig) -> list[str]:
    """The attention backends to try, in this order; none: torch's own order."""
    if config.attention == "auto":
        return []
    order = [config.attention, *(name for name in BACKENDS if name != config.attention)]
    return order[: order.index("math") + 1]  # math takes everything


@contextmanager
def torch_settings(config: ComputeConfig) -> Iterator[None]:
    """The settings that torch keeps per process, for all that is done inside; put back at the end.

    The backend of attention is chosen in the forward pass, and backward follows. A compiled graph keeps
    the choice of its compilation, on the disk, too, under a key that does not tell the backends apart
    (pytorch/pytorch#185449); the tag does.
    """
    with ExitStack() as stack:
        if order := attention_order(config):
            stack.enter_context(sdpa_kernel([BACKENDS[name] for name in order], set_priority=True))
            tag = f"{torch.compiler.config.cache_key_tag} attention={','.join(order)}"
            stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))
        yield


def prepare(model: nn.Module, config: ComputeConfig, half: bool) -> None:
    """Apply to a GPT what is to be set there; half: whether it computes under bf16 autocast.

    Raises ValueError for a setting without meaning in float32.
    """
    if config.residual == "bfloat16" and not half:
        raise ValueError('compute.residual="bfloat16": this run computes in float32; set --dtype=bfloat16 as well')
    # layer norms reckon in float32 whatever they are given, and autocast ends each branch in bf16: so do the sums
    model.residual_dtype = torch.bfloat16 if config.residual == "bfloat16" else None
    model.recompute_blocks = config.activation_checkpointing
