"""What others would write, to be measured against: a GPT in plain PyTorch, and MARS-M tensor by tensor."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTConfig
from optimizers.standalone.mars_m import MARSM


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, whole_matrix: bool) -> None:
        super().__init__()
        self.heads, self.whole_matrix = heads, whole_matrix
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        y = attend(q, k, v) if self.whole_matrix else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v (B, H, T, D) by way of the whole T x T matrix."""
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT) * (1 / math.sqrt(q.size(3)))
    return scores.masked_fill(future, -torch.inf).softmax(dim=3).to(v.dtype) @ v


class PlainGPT(nn.Module):
    """A GPT of the same shape as anybody would write it in plain PyTorch, with tied head.

    whole_matrix: attention by way of the whole T x T matrix.
    """

    def __init__(self, c: GPTConfig, whole_matrix: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head, whole_matrix) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Token ids and targets (B, T) to the mean loss."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def mars_m_by_tensor(matrices: Sequence[Tensor], rest: Sequence[Tensor]) -> Callable[[], None]:
    """A step of MARS-M on matrices and of AdamW on the rest, tensor by tensor, as the papers' code computes them."""
    optimizers = MARSM(matrices), torch.optim.AdamW(rest, lr=6e-3, foreach=False)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step
