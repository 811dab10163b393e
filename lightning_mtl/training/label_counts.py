"""How much of each task's labels there is, counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl


class LabelCounts:
    """The fraction of each task's samples that is labelled, over the first epoch and all ranks.

    Numbers that the host knows anyway are added up, in training steps of the first epoch alone: no transfer, no call a
    task in any other step. A sample whose target is labelled in part, a map for instance, counts as that part.

    Example:
        >>> counts = LabelCounts(["age", "smile"])
        >>> counts.counting = True
        >>> counts.add("age", num_samples=3, num_missing=1, batch_size=4)
        >>> counts.add_unlabelled(["age"], batch_size=2)
        >>> counts.fractions(counts.sums)
        {'age': 0.5}
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.position = {task: index for index, task in enumerate(tasks)}
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        # Labelled samples, all samples, and how often one was looked for.
        self.sums: list[list[float]] = [[0.0] * len(self.position) for _ in range(3)]
        self.counting = False

    @property
    def counts_now(self) -> bool:
        """Whether this is a training step's own look at its batch: evaluations, and second looks, have no gradients."""
        return self.counting and torch.is_grad_enabled()

    def add(self, task: str, num_samples: int, num_missing: int, batch_size: int, *, looked: bool = True) -> None:
        """Count a batch that has the task."""
        if self.counts_now and batch_size:
            self._add(task, batch_size * num_samples / max(num_samples + num_missing, 1), batch_size, looked=looked)

    def add_unlabelled(self, tasks: Iterable[str], batch_size: int) -> None:
        """Count a batch that has no label at all of these tasks."""
        if self.counts_now:
            for task in tasks:
                self._add(task, 0.0, batch_size, looked=True)

    def _add(self, task: str, labelled: float, size: int, *, looked: bool) -> None:
        index = self.position[task]
        for row, value in zip(self.sums, (labelled, float(size), float(looked)), strict=True):
            row[index] += value

    def fractions(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        """The fraction of each task that might lack labels, from sums like this object's."""
        return {
            task: sums[0][index] / sums[1][index]
            for task, index in self.position.items()
            if sums[2][index] and sums[1][index]
        }

    def log(self, module: pl.LightningModule) -> None:
        """Log ``labelled/<task>`` over all ranks for each task that might lack labels."""
        self.counting = False
        # MPS has no float64.
        dtype = torch.float32 if module.device.type == "mps" else torch.float64
        own = torch.tensor(self.sums, dtype=dtype, device=module.device)
        total: Tensor = module.trainer.strategy.reduce(own, reduce_op="sum")
        for task, fraction in self.fractions(total.tolist()).items():
            module.log(f"labelled/{task}", torch.tensor(fraction, dtype=torch.float32), batch_size=1)

    def state_dict(self) -> Tensor:
        """The sums so far, ``[3, K]``."""
        return torch.tensor(self.sums, dtype=torch.float64)

    def load_state_dict(self, state: Tensor) -> None:
        """Go on from the sums of an interrupted epoch."""
        self.sums = state.tolist()
