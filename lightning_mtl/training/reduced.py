"""What has been reduced over the ranks of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Reduced:
    """One micro-batch's losses of the K tasks that some rank has samples of.

    Attributes:
        names: These tasks, in the module's order, the same on every rank.
        losses: ``[K]``, detached: the mean over all ranks' samples, or over the ranks that have the task.
        own: This rank's losses, detached, of the tasks that it has.
        counts: ``[K]``, the samples of all ranks, None where every task counts the same.
        own_counts: ``[K]``, this rank's samples, 0 for a task that it lacks; None where all are 1.
        scores: ``[K]``, the batch's metric values, averaged like the losses; None if there are none.
    """

    names: list[str]
    losses: Tensor
    own: Tensor
    counts: Tensor | None
    own_counts: Tensor | None
    scores: Tensor | None = None

    def shares(self) -> Tensor | None:
        """This rank's share of each task's mean, ``[K]``; None means all of it."""
        if self.own_counts is None or self.counts is None:
            return None
        return self.own_counts / self.counts
