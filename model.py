"""GPT-2 (Radford et al. 2019) under OpenAI's parameter names.

Letters in shapes: B sequences, T positions, C = n_embd, H heads, D = C / H, V = vocab_size,
P = V rounded up to a multiple of 64, the rows of the embedding table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimizers.options import errors_of, option

# torch 2.11 has no loss in chunks; a type checker that knows only that version must not look for it
newest_nn: Any = nn
LOSS_ROWS = 512  # positions per chunk, if the loss is computed in chunks


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The four released sizes differ in n_layer, n_head and n_embd only."""

    n_layer: int = option(12, "transformer blocks", least=1)
    n_head: int = option(12, "attention heads per block", least=1)
    n_embd: int = option(768, "width of the residual stream", least=1)
    block_size: int = option(1024, "longest context, in tokens", least=1)
    vocab_size: int = option(50257, "token ids the model reads and emits; the table is padded to 64 rows", least=1)
    bias: bool = option(False, "biases in linear layers and layer norms (OpenAI: true, MARS papers: false)")
    dropout: float = option(0.0, "dropout on embeddings, attention and residual branches", least=0, below=1)
    gelu: Literal["tanh", "exact"] = option("tanh", "form of the GELU: tanh (GPT-2) or exact (erf, nanoGPT)")
    scale_attn_by_inverse_layer_idx: bool = option(False, "also divide attention logits by layer + 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 64, for tensor cores."""
        return -(-self.vocab_size // 64) * 64

    def errors(self) -> list[str]:
        """Everything wrong with this config, one line each."""
        out = errors_of(self)
        if not out and self.n_embd % self.n_head:
            out.append(f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}")
        return out


class KVCache:
    """Keys and values of the positions already read, one pair (B, H, T, D) per layer.

    padding: (B,), the number of ids to ignore at the left of each row, for a batch of prompts of unequal lengths.
    """

    def __init__(self, padding: Tensor | None = None) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.padding = padding

    def __len__(self) -> int:
        return self.layers[0][0].size(2) if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, t, D) to a layer and return all of its keys and values."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[layer] = (k, v)
        return k, v

    def mask(self, queries: int, keys: int) -> Tensor | None:
        """Which keys the last positions read, (B, 1, queries, keys); None without padding.

        Ignored positions read themselves, so that no softmax is empty.
        """
        if self.padding is None:
            return None
        key = torch.arange(keys, device=self.padding.device)
        query = key[keys - queries :, None]
        return ((key <= query) & (key >= self.padding[:, None, None]) | (key == query))[:, None]


class CausalSelfAttention(nn.Module):
    """Causal attention of H heads, (B, T, C) to (B, T, C); a cache holds the keys and values of earlier positions."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            assert T == 1 or len(cache) == 0 or self.layer not in cache.layers, "append one token at a time"
            k, v = cache.extend(self.layer, k, v)
        mask = cache.mask(T, k.size(2)) if cache is not None else None
        dropout, causal = self.dropout if self.training else 0.0, T > 1 and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=self.scale)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, 4 C wide inside, (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.approximate = {"tanh": "tanh", "exact": "none"}[config.gelu]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The parts of the model, under OpenAI's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    """GPT-2: learned positions, pre-LayerNorm blocks, output layer tied to the token embedding.

    Raises ValueError for an impossible config.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if errors := config.errors():
            raise ValueError("; ".join(errors))
        self.config = config
        self.residual_dtype: torch.dtype | None = None  # None: that of the embeddings
        # maps hidden (N, C), table (P, C), targets (N,) and vocab_size to the mean loss; None: torch's functions do
        self.fused_loss: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
        self.recompute_blocks = False  # activation checkpointing: keep only the input of each block
        self.transformer = Transformer(config)
        for name, p in self.named_parameters():
            if p.dim() >= 2:  # residual branches are scaled down so that their sum keeps unit variance
                scaled = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if scaled else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) to the final layer norm's output (B, T, C); a cache holds earlier positions."""
        start = len(cache) if cache is not None else 0
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in the context of {self.config.block_size}")
        # positions are a slice, not a lookup: its backward is a plain sum instead of atomic adds
        positions = self.transformer.wpe.weight[start : start + T]
        if cache is not None and cache.padding is not None:
            column = torch.arange(start, start + T, device=idx.device)
            positions = self.transformer.wpe((column - cache.padding[:, None]).clamp(min=0))
        x = self.transformer.wte(idx) + positions
        x = F.dropout(x, self.config.dropout, self.training).to(self.residual_dtype or x.dtype)
        for block in self.transformer.h:
            if self.recompute_blocks and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., V). Padded rows of the table are left out, so no softmax sees them."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V), or, given targets (B, T), to the scalar mean loss.

        The loss is the cross-entropy in nats per token over the targets that are not -1. It is part of
        the same graph as the model, so that a compiler can fuse the two and keep no float32 logits. In
        float32 on a CPU, it is computed in chunks of LOSS_ROWS positions if torch can do that.
        """
        hidden = self.hidden(idx)
        return self.logits(hidden) if targets is None else self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Hidden states (B, T, C) and targets (B, T) to the mean loss; see `forward`."""
        if self.fused_loss and torch.is_grad_enabled():
            table = self.transformer.wte.weight
            return self.fused_loss(hidden.flatten(0, 1), table, targets.flatten(), self.config.vocab_size)
        if not self._loss_in_chunks(hidden):
            logits = self.logits(hidden).flatten(0, 1).float()  # else torch rounds the log-softmax to bf16
            return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        weight = self.transformer.wte.weight[: self.config.vocab_size]
        loss, options = newest_nn.functional.linear_cross_entropy, newest_nn.LinearCrossEntropyOptions
        chunks = options(batch_chunk_size=LOSS_ROWS)
        return loss(hidden.flatten(0, 1), weight, targets.flatten(), ignore_index=-1, options=chunks)

    def _loss_in_chunks(self, hidden: Tensor) -> bool:
        """Whether to compute the loss in chunks: only where logits are so large that memory limits the speed."""
        eager = hidden.device.type == "cpu" and not torch.compiler.is_compiling() and hidden.dtype == torch.float32
        large = self.config.vocab_size > 8 * self.config.n_embd and hidden[..., 0].numel() > LOSS_ROWS
        return large and eager and not torch.is_autocast_enabled("cpu") and hasattr(nn, "LinearCrossEntropyOptions")

    def parameter_roles(self) -> dict[str, str]:
        """Each parameter's name to its role: "matrix", "embedding" or "vector" (gains and biases)."""
        embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
        return {
            name: "embedding" if name in embeddings else "matrix" if p.dim() >= 2 else "vector"
            for name, p in self.named_parameters()
        }

    def num_params(self, positions: bool = True) -> int:
        """Number of parameters. The tied table counts once, and the position table only if `positions` is true."""
        return sum(p.numel() for p in self.parameters()) - (0 if positions else self.transformer.wpe.weight.numel())

    def flops_per_token(self) -> float:
        """Training FLOPs (forward and backward) per token at full context: 6 N + 12 L C T.

        N: parameters without the position table. Masked attention is counted, as in published MFU figures
        (Chowdhery et al. 2022, appendix B).
        """
        c = self.config
        return 6.0 * self.num_params(positions=False) + 12.0 * c.n_layer * c.n_embd * c.block_size
