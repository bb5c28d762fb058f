"""Parameters seen as matrices, families of one shape, and the rank that owns each matrix."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
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


class Ownership:
    """Divides matrices over the ranks of a process group; without a group this process owns everything."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.owner: dict[Tensor, int] = {}
        self._load = [0.0] * self.size  # work assigned to each rank

    def assign(self, members: Iterable[list[Tensor]], cost: Callable[[Tensor], float]) -> None:
        """Give each parameter of some families to the rank with the least work so far, costly families first."""
        for family in sorted(members, key=lambda family: -cost(family[0])):
            for p in family:
                self.owner[p] = min(range(self.size), key=self._load.__getitem__)
                self._load[self.owner[p]] += cost(p)

    def holds(self, p: Tensor) -> bool:
        """Whether this rank holds the state of a parameter."""
        return self.owner.get(p, self.rank) == self.rank

    def gather(
        self, family: list[Tensor], results: dict[Tensor, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> tuple[dist.Work | None, list[Tensor]]:
        """Start to exchange the results, all of one shape, of a family's parameters.

        results: this rank's, by parameter.
        Returns the pending transfer (None if there is none) and the results in the family's order, valid after it.
        """
        if self.size == 1:
            return None, [results[p] for p in family]
        device, slot_of, taken = family[0].device, {}, [0] * self.size
        for p in family:
            slot_of[p], taken[self.owner[p]] = taken[self.owner[p]], taken[self.owner[p]] + 1
        slots = max(taken)
        send = torch.zeros(slots, *shape, dtype=dtype, device=device)
        for p, result in results.items():
            send[slot_of[p]].copy_(result)
        received = torch.empty(self.size * slots, *shape, dtype=dtype, device=device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        work = gather(received, send, group=self.group, async_op=True)
        return work, [received[self.owner[p] * slots + slot_of[p]] for p in family]
