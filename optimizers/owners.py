"""Who works on each matrix, how a matrix reaches its owner, and how the result comes back.

A direction such as Newton-Schulz needs a whole matrix. Three kinds of owners give it one:

    Owners       this process has everything, and works on everything
    Replicated   every rank has whole weights and gradients; each works on some matrices and sends the results
    Sharded      every rank has a shard of each matrix; shards travel to one owner a matrix, and results travel back

`collect` and `share` are generators: they pause while something travels, so that other work can be done meanwhile.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import local, shard_shapes, sharding_of

Inputs = Callable[[list[Tensor]], list[Tensor]]  # of some parameters, in their order
Pauses = Generator[None, None, Any]


class Owners:
    """A process that is alone, and the division of work over several ranks, which the other kinds share."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.owner: dict[Tensor, int] = {}
        self._load = [0.0] * size  # work assigned to each rank

    def assign(self, members: Iterable[list[Tensor]], cost: Callable[[Tensor], float]) -> None:
        """Give each parameter of some families to the rank with the least work so far, costly families first."""
        for family in sorted(members, key=lambda family: -cost(family[0])):
            for p in family:
                self.owner[p] = min(range(self.size), key=self._load.__getitem__)
                self._load[self.owner[p]] += cost(p)

    def owns(self, p: Tensor) -> bool:
        """Whether this rank works on a parameter as a whole; on what is no matrix, every rank does."""
        return self.owner.get(p, self.rank) == self.rank

    def holds(self, p: Tensor) -> bool:
        """Whether this rank has state of a parameter's shape, whole or a shard."""
        return self.owns(p)

    def collect(self, family: list[Tensor], inputs: Inputs, dtype: torch.dtype) -> Pauses:
        """Returns a function that gives the whole inputs of parameters that this rank owns.

        inputs: makes the inputs from what this rank holds. dtype: in which inputs travel.
        """
        yield from ()
        return inputs

    def share(self, family: list[Tensor], results: dict[Tensor, Tensor], dtype: torch.dtype) -> Pauses:
        """Returns, for each parameter of a family, the result in the shape of what this rank holds.

        results: whole results of the parameters that this rank owns; emptied. dtype: in which results travel.
        """
        yield from ()
        return results


class Replicated(Owners):
    """Ranks with equal gradients. Results travel by one all-gather for each family."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def share(self, family: list[Tensor], results: dict[Tensor, Tensor], dtype: torch.dtype) -> Pauses:
        slot_of, taken = {}, [0] * self.size
        for p in family:
            slot_of[p], taken[self.owner[p]] = taken[self.owner[p]], taken[self.owner[p]] + 1
        slots, like = max(taken), family[0]
        send = torch.zeros(slots, like.numel(), dtype=dtype, device=like.device)
        for p in list(results):
            send[slot_of[p]].view(p.shape).copy_(results.pop(p))
        received = send.new_empty(self.size * slots, like.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        work = gather(received, send, group=self.group, async_op=True)
        yield
        work.wait()
        return {p: received[self.owner[p] * slots + slot_of[p]].view(p.shape) for p in family}


class Sharded(Owners):
    """Ranks that hold shards of every matrix. Inputs and results travel by one all-to-all each for each family."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[Tensor, list[torch.Size]] = {}  # of the shards of each parameter, by rank
        self._dim: dict[Tensor, int] = {}  # of each parameter, the one that is cut
        self._mesh_dim = 0
        self._with_gradient: list[bool] = []  # of each parameter, at the last step
        self._counts = torch.empty(0)

    @property
    def first(self) -> Tensor | None:
        """The first sharded parameter; all others have its mesh."""
        return next(iter(self.shapes), None)

    def _group(self) -> dist.ProcessGroup:  # looked up, because a group cannot be copied or pickled
        return self.first.device_mesh.get_group(self._mesh_dim)  # type: ignore[union-attr]

    def add(self, p: Tensor) -> None:
        """Take in a sharded parameter, which `sharding_errors` has nothing against."""
        mesh, (self._mesh_dim, self._dim[p]) = p.device_mesh, sharding_of(p)  # type: ignore
        if not self.shapes:
            super().__init__(mesh.get_local_rank(self._mesh_dim), mesh.size(self._mesh_dim))
        self.shapes[p] = shard_shapes(p)

    def holds(self, p: Tensor) -> bool:
        return True

    def collect(self, family: list[Tensor], inputs: Inputs, dtype: torch.dtype) -> Pauses:
        mine = [p for p in family if self.owns(p)]
        by_owner = sorted(family, key=self.owner.__getitem__)
        parts = yield from self._exchange(
            [x.to(dtype) for x in inputs(by_owner)],
            [sum(self.shapes[p][self.rank].numel() for p in by_owner if self.owner[p] == r) for r in range(self.size)],
            [[self.shapes[p][r] for p in mine] for r in range(self.size)],
        )
        whole = {p: torch.cat([parts[r][i] for r in range(self.size)], self._dim[p]) for i, p in enumerate(mine)}
        return lambda params: [whole.pop(p) for p in params]

    def share(self, family: list[Tensor], results: dict[Tensor, Tensor], dtype: torch.dtype) -> Pauses:
        mine, like = [p for p in family if self.owns(p)], local(family[0])
        cut = {p: self._cut(p, results.pop(p).to(dtype)) for p in mine}
        theirs = [[p for p in family if self.owner[p] == r] for r in range(self.size)]
        parts = yield from self._exchange(
            [like.new_empty(0, dtype=dtype), *(cut[p].pop(0) for _ in range(self.size) for p in mine)],
            [sum(self.shapes[p][r].numel() for p in mine) for r in range(self.size)],
            [[self.shapes[p][self.rank] for p in of_rank] for of_rank in theirs],
        )
        return {p: x for of_rank, got in zip(theirs, parts, strict=True) for p, x in zip(of_rank, got, strict=True)}

    def _cut(self, p: Tensor, x: Tensor) -> list[Tensor]:
        """The shards of a whole tensor, by rank."""
        return list(x.split([shape[self._dim[p]] for shape in self.shapes[p]], self._dim[p]))

    def _exchange(self, send: list[Tensor], sizes: list[int], shapes: list[list[torch.Size]]) -> Pauses:
        """One all-to-all. send: what goes out, in the order of ranks; sizes: how many numbers of it go to each rank.

        shapes: of what each rank sends here. Returns that, a list for each rank.
        """
        flat = torch.cat([x.reshape(-1) for x in send])
        send.clear()  # its memory, before the pause
        numbers = [[shape.numel() for shape in of_rank] for of_rank in shapes]
        received = flat.new_empty(sum(map(sum, numbers)))
        work = dist.all_to_all_single(
            received, flat, [sum(n) for n in numbers], sizes, group=self._group(), async_op=True
        )
        yield
        work.wait()
        parts = zip(received.split([sum(n) for n in numbers]), numbers, shapes, strict=True)
        return [[x.view(s) for x, s in zip(part.split(n), of, strict=True)] for part, n, of in parts]

    def total_norms(self, norms: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Norms of whole tensors from those of shards, 0-d in float64; 0 where no rank has one. One all-reduce.

        Raises ValueError if some ranks have a gradient of a parameter and others have none. On a GPU the host looks at
        that only where it changed, for it has to wait.
        """
        with_gradient, device = [p.grad is not None for p in self.shapes], local(self.first).device
        if changed := with_gradient != self._with_gradient or self._counts.device != device:
            self._counts = torch.tensor(with_gradient, dtype=torch.float64, device=device)
        zero = self._counts.new_zeros(())
        sums = torch.stack([self._counts, torch.stack([norms.get(p, zero) for p in self.shapes]).square()])
        dist.all_reduce(sums, group=self._group())
        if changed or device.type == "cpu":
            self._check_counts(sums[0].tolist())
        self._with_gradient = with_gradient
        return dict(zip(self.shapes, sums[1].sqrt().unbind(), strict=True))

    def _check_counts(self, counts: list[float]) -> None:
        for p, n in zip(self.shapes, counts, strict=True):
            if n not in (0, self.size):
                raise ValueError(
                    f"parameter of shape {tuple(p.shape)}: {n:g} of {self.size} ranks have a gradient; all or none "
                    "must, so give the others one of zeros"
                )
