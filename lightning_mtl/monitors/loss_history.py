"""Losses over a whole training, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LossHistory:
    """Losses of K tasks at regular steps, in bounded memory: when full, every second one is dropped.

    Args:
        num_tasks: K.
        every: Steps between two losses at the beginning.
        capacity: How many losses of a task are kept at most.

    Example:
        >>> history = LossHistory(num_tasks=1, every=1, capacity=4)
        >>> for step in range(6):
        ...     history.add(step, torch.tensor([float(step)]), [0])
        >>> history.steps.tolist(), history.losses[:, 0].tolist()
        ([0, 2, 4], [0.0, 2.0, 4.0])
    """

    def __init__(self, num_tasks: int, every: int, capacity: int = 2048) -> None:
        self.every, self.length = every, 0
        self._steps = torch.zeros(capacity, dtype=torch.long)
        self._losses = torch.zeros(capacity, num_tasks)

    @property
    def steps(self) -> Tensor:
        """The steps that were kept, ``[T]``."""
        return self._steps[: self.length]

    @property
    def losses(self) -> Tensor:
        """Their losses, ``[T, K]``; not a number where a task was absent."""
        return self._losses[: self.length]

    def add(self, step: int, losses: Tensor, present: Sequence[int]) -> None:
        """Keep the losses of the present tasks, if the step is one of those to keep."""
        if step % self.every:
            return
        if self.length == len(self._steps):
            self.every *= 2
            kept = (self.steps % self.every == 0).nonzero().flatten()
            self.length = len(kept)
            self._steps[: self.length] = self._steps[kept]
            self._losses[: self.length] = self._losses[kept]
            if step % self.every:
                return
        self._steps[self.length] = step
        self._losses[self.length] = torch.nan
        self._losses[self.length, list(present)] = losses.to(self._losses)
        self.length += 1

    def restore(self, every: int, steps: Tensor, losses: Tensor) -> None:
        """Take back what another history of the same tasks held."""
        self.every, self.length = every, len(steps)
        self._steps[: self.length], self._losses[: self.length] = steps, losses
