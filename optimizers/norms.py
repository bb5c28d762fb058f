"""Euclidean norms that do not overflow: squares of float32 numbers above 2e19 do, so they are summed in float64.

On a CPU float64 is used only where float32 overflowed. On other devices a look at the result would wait for the
device, and float64 costs nothing beside the reading of memory.
"""

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def norm_of(x: Tensor) -> Tensor:
    """Norm of a tensor, 0-d; not finite only if an element is not."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        norm = torch.linalg.vector_norm(x)
        if math.isfinite(norm.item()):
            return norm
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def norms_of_matrices(x: Tensor) -> Tensor:
    """Norms of a stack of matrices (count, m, n), as (count, 1, 1); 0 only for matrices of zeros."""
    if x.device.type == "cpu":
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        if bool(((norms > 1e-15) & (norms < torch.inf)).all()):  # smaller squares underflow
            return norms
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def norms_of_rows(x: Tensor) -> Tensor:
    """Norms of the rows of a tensor in float64, (rows,); a vector is one row."""
    return torch.linalg.vector_norm(x.reshape(x.shape[0] if x.dim() > 1 else 1, -1), dim=1, dtype=torch.float64)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Norm of all elements of all tensors, 0-d; not finite only if an element is not."""
    if not tensors or tensors[0].device.type == "cpu":
        norm = get_total_norm(tensors)
        if math.isfinite(norm.item()):
            return norm
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
