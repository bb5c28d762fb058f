"""Saving between steps: when a checkpoint fails, on a full disk for example, the run continues and says so."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from optimizers.shards import local
from runtime.distributed import World
from training.checkpoint import Checkpointer, CheckpointError


class Saver:
    """Starts and finishes the checkpoints of a run, and says which one is complete or why it failed."""

    def __init__(self, checkpoints: Checkpointer, step: int, say: Callable[[str], None]) -> None:
        """step: where the run starts; this step needs no saving. say: prints a line."""
        self.checkpoints, self.step, self.say = checkpoints, step, say

    def after_step(self, step: int, due: bool, last: bool, save: Callable[[], Path | None]) -> None:
        """Save this step if a checkpoint is due, and announce one that was written in the background.

        last: the run ends here; save this step in any case, wait for it, and raise CheckpointError if it fails.
        save: writes the checkpoint and returns its folder; in the background, starts to write it and returns None.
        """
        due = self.step != step and (due or last)
        goes_on = "" if last else "training continues; "
        self._announce(self.checkpoints.finish if due or last else self.checkpoints.poll, goes_on)
        if due:
            self.step = step
            self._announce(save, goes_on)
        if last:
            self._announce(self.checkpoints.finish, goes_on)
            if self.step != step:
                raise CheckpointError(f"the run stops at step {step} without its last checkpoint; see above")

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, because the run ends with an error."""
        self._announce(self.checkpoints.finish, "")

    def _announce(self, saving: Callable[[], Path | None], goes_on: str) -> None:
        try:
            if folder := saving():
                self.say(f"saved {folder}")
        except CheckpointError as error:
            self.step = -1  # try this step again, if it is the last one
            self.say(f"{error}; {goes_on}earlier checkpoints are intact")


@torch.no_grad()
def replica_warning(weights: Iterable[Tensor], world: World, shards: int) -> str:
    """A warning if ranks hold other weights than the first rank with the same shards; empty if all are equal.

    A faulty device or link causes that. Equal gradients and equal updates keep replicas equal bit for bit, and nothing
    else compares them. The cost is one pass over the weights and a small exchange between the ranks.

    shards: over how many ranks weights are divided.
    """
    if world.size == shards:
        return ""
    words = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    sums = [w.reshape(-1).view(words[w.element_size()]).sum(dtype=torch.int64) for w in map(local, weights)]
    found = world.gather(torch.stack(sums).tolist())
    other = [rank for rank, sums_of_rank in enumerate(found) if sums_of_rank != found[rank % shards]]
    ranks = ", ".join(map(str, other[:8])) + (" and more" if len(other) > 8 else "")
    first = f"the first {shards} ranks" if shards > 1 else "rank 0"
    advice = f"a device or a link is faulty, or the machines differ; the weights of {first} are saved"
    return f"warning: the weights of rank {ranks} differ from those of {first}: {advice}" if other else ""
