"""DWA weighs by how fast each loss fell over the last epochs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals


def dwa_weights(last: Tensor, before: Tensor, temperature: float) -> Tensor:
    """Compute ``K softmax(r / T)`` with ``r_k = last_k / before_k``; a task without both means counts as r = 1.

    Args:
        last: ``[K]``, mean losses of the last epoch, nan where there are none.
        before: ``[K]``, those of the epoch before.
        temperature: T; large values even the weights out.

    Example:
        >>> dwa_weights(torch.tensor([0.9, 1.0, 2.9]), torch.tensor([1.0, 2.0, 3.0]), 2.0)
        tensor([1.0517, 0.8610, 1.0873])
    """
    ratios = last / before
    known = torch.where(torch.isfinite(ratios), ratios, torch.ones_like(ratios))
    return known.numel() * torch.softmax(known / temperature, dim=0)


class DWA(Weighting):
    r"""Weigh tasks by the rate at which their losses fell: dynamic weight average.

    .. math:: w_k(e) = K \operatorname{softmax}_k\!\left(\frac{r_k}{T}\right), \qquad
        r_k = \frac{\bar L_k(e - 1)}{\bar L_k(e - 2)}

    with :math:`\bar L_k(e)` the mean loss over epoch e, the mean of its optimizer steps. The weights are 1 in the first
    two epochs, and change once an epoch.

    When: tasks that learn at unlike speeds. It never looks at how large the losses are.

    Args:
        temperature: T; the paper uses 2.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`. Epochs count
            from ``start_step``.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, 2019, arXiv:1803.10704, equation 7.

    Deviations: none from the paper.

    Example:
        >>> DWA(temperature=2.0).temperature
        2.0
    """

    reads_losses: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {"temperature": Range(0.5, 5.0, log=True)}

    def __init__(self, temperature: float = 2.0, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)
        if not temperature > 0:
            raise ValueError(f"DWA(temperature={temperature}) must be above 0.")
        self.temperature = temperature
        # Means of its own: Lightning's epoch means do not survive an interruption.
        for name, start in (("mean", 0.0), ("count", 0.0), ("last", torch.nan), ("before", torch.nan)):
            self.add_state(name, torch.tensor(start))
        self.add_state("epoch", torch.tensor(-1))
        self.mean: Tensor
        self.count: Tensor
        self.last: Tensor
        self.before: Tensor
        self.epoch: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the last two epochs' means."""
        # Closes the means of a task's earlier epoch, if it took steps in one.
        ended = (self.epoch != signals.epoch) & (self.count > 0)
        self.before = torch.where(ended, self.last, self.before)
        self.last = torch.where(ended, self.mean, self.last)
        self.count = self.count * ~ended
        self.epoch = torch.full_like(self.epoch, signals.epoch)
        return dwa_weights(self.last, self.before, self.temperature)

    def update(self, signals: Signals) -> None:
        """Add the step's losses to the epoch's means."""
        self.count = self.count + 1
        first = self.count == 1
        losses = signals.losses.to(self.mean)
        self.mean = torch.where(first, losses, self.mean + (losses - self.mean) / self.count)
