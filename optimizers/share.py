"""Dividing the costly part of a step over processes: every matrix has one owner."""

import torch
import torch.distributed as dist
from torch import Tensor


class Share:
    """Who owns what in a process group; without one, this process owns everything."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def owner(self, index: int, count: int) -> int:
        """The rank that owns item `index` of `count`: contiguous slices of ceil(count / size)."""
        return index // -(-count // self.size)

    def gather(
        self, mine: list[Tensor | None], count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> tuple[dist.Work | None, list[Tensor | None]]:
        """Start to share the results, all of one shape, of `count` items, of which `mine` are this rank's.

        An item without a result is None. Returns the transfer in flight (None if there is none) and the
        results in order, valid once it has finished.
        """
        if self.size == 1:
            return None, mine
        slots = -(-count // self.size)
        send = torch.zeros(slots, *shape, dtype=dtype, device=device)
        for slot, result in zip(send, mine, strict=False):
            if result is not None:
                slot.copy_(result)
        received = torch.empty(self.size * slots, *shape, dtype=dtype, device=device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        work = gather(received, send, group=self.group, async_op=True)
        return work, list(received[:count])
