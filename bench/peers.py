"""What others would write, to be measured against: a GPT in plain PyTorch and optimizers tensor by tensor."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTConfig
from optimizers.newton_schulz import COEFFICIENTS


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, materialized: bool) -> None:
        super().__init__()
        self.heads, self.materialized = heads, materialized
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        y = attend(q, k, v) if self.materialized else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v (B, H, T, D) by way of the whole T x T matrix."""
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT) * (1 / math.sqrt(q.size(3)))
    return scores.masked_fill(future, -torch.inf).softmax(dim=3).to(v.dtype) @ v


class PlainGPT(nn.Module):
    """A GPT of the same shape as anybody would write it in plain PyTorch, with tied head.

    materialized: attention by way of the whole T x T matrix.
    """

    def __init__(self, c: GPTConfig, materialized: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head, materialized) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Token ids (B, T) to logits (B, T, V), or, given targets (B, T), to the mean loss."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return logits if targets is None else plain_loss(logits, targets)


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V)."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def plain_newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalized matrices G (..., m, n), m <= n, in bfloat16, written as the formula reads."""
    a, b, c = COEFFICIENTS
    X = G.bfloat16()
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def corrected(grad: Any, previous: Tensor, gamma: float, beta: float) -> Tensor:
    """MARS's corrected gradient, most operations into a new tensor, and its clip decided on the host."""
    c = torch.add(grad, torch.mul(torch.sub(grad, previous), gamma * beta / (1 - beta)))
    norm = torch.norm(c)
    return torch.div(c, norm) if norm > 1 else c


def published_mars(params: list[Tensor]) -> Callable[[], None]:
    """MARS-AdamW as its authors' class computes it: tensor by tensor, most operations into a new tensor, and the
    clip decided on the host. The gradient itself is kept as the previous one, without a copy."""
    state: dict[Tensor, Any] = {p: [torch.zeros_like(p) for _ in range(3)] for p in params}
    lr, betas, gamma, decay, count = 6e-3, (0.95, 0.99), 0.025, 0.01, 0

    def step() -> None:
        nonlocal count
        count += 1
        for p in params:
            previous, m, v = state[p]
            _adam(p, corrected(p.grad, previous, gamma, betas[0]), m, v, count, lr, betas, decay)
            state[p][0] = p.grad

    return torch.no_grad()(step)


def published_mars_m(matrices: Sequence[Tensor], rest: Sequence[Tensor]) -> Callable[[], None]:
    """MARS-M on matrices and AdamW on the rest in the same manner, Newton-Schulz matrix by matrix."""
    state: dict[Tensor, Any] = {p: [torch.zeros_like(p) for _ in range(2)] for p in [*matrices, *rest]}
    lr, beta, gamma, decay, count = 6e-3, 0.95, 0.025, 0.1, 0

    def step() -> None:
        nonlocal count
        count += 1
        for p in matrices:
            previous, m = state[p]
            m.mul_(beta).add_(corrected(p.grad, previous, gamma, beta), alpha=1 - beta)
            tall = m.size(0) > m.size(1)
            update = plain_newton_schulz(m.mT if tall else m)
            p.mul_(1 - lr * decay)
            p.add_(update.mT if tall else update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)
            state[p][0] = p.grad
        for p in rest:
            m, v = state[p]
            _adam(p, p.grad, m, v, count, lr, (0.9, 0.95), 0.0)

    return torch.no_grad()(step)


def _adam(
    p: Tensor, c: Any, m: Tensor, v: Tensor, count: int, lr: float, betas: tuple[float, float], decay: float
) -> None:
    m.mul_(betas[0]).add_(c, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(c, c, value=1 - betas[1])
    root = torch.add(torch.mul(torch.sqrt(v), (1 - betas[1] ** count) ** -0.5), 1e-8)
    direction = torch.div(m, torch.mul(root, 1 - betas[0] ** count))
    p.add_(torch.mul(torch.add(torch.mul(p, decay), direction), -lr))
