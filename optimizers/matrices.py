"""Parameters seen as matrices, and families of one shape."""

from collections.abc import Iterable

from torch import Tensor


def matrix_shape(p: Tensor, blocks: int) -> tuple[int, int]:
    """Rows and columns of a parameter seen as `blocks` matrices; filters are flattened to (out, rest)."""
    return p.shape[0] // blocks, p.shape[1:].numel()


def as_wide_matrices(p: Tensor, blocks: int) -> Tensor:
    """A parameter as (blocks, m, n) with m <= n, transposed where it is tall."""
    matrices = p.reshape(blocks, *matrix_shape(p, blocks))
    return matrices.mT if matrices.size(1) > matrices.size(2) else matrices


def from_wide_matrices(wide: Tensor, like: Tensor, blocks: int) -> Tensor:
    """The inverse of `as_wide_matrices`, in the shape of the parameter `like`."""
    rows, columns = matrix_shape(like, blocks)
    return (wide.mT if rows > columns else wide).reshape(like.shape)


def families(params: Iterable[Tensor], blocks: int) -> list[list[Tensor]]:
    """Parameters grouped by the shape of their matrices; a matrix and its transpose have one shape."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for p in params:
        found.setdefault(tuple(sorted(matrix_shape(p, blocks))), []).append(p)
    return list(found.values())
