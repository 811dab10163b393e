"""Weights that grow as a loss vanishes are bounded by a floor of the losses, and said to have outgrown the others."""

from __future__ import annotations

import math
import statistics

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.method.signals import Signals

LOSS_FLOOR = 1e-7
"""Losses below this count as this much, where a method divides by them or takes their logarithms."""
LARGE = 1e4
"""The weight, relative to the median of the others', from which on the user hears of it."""

BETWEEN_LOOKS = 100
"""Steps between two looks at weights that lie on a device."""


def check_loss_floor(method: str, loss_floor: float) -> float:
    """Return a floor as given to a method.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not (math.isfinite(loss_floor) and loss_floor > 0):
        raise ValueError(f"{method}(loss_floor={loss_floor}) must be above 0 and finite.")
    return loss_floor


class Outgrown:
    """Warns once when one task's weight is 1e4 times the median of the others'.

    Args:
        method: The method's name.
        cure: What the user can do.

    Example:
        >>> import torch
        >>> Outgrown("GLS", "raise loss_floor").look(
        ...     torch.tensor([1.0, 2.0]), Signals(("a", "b"), torch.ones(2), step=0, epoch=0)
        ... )
    """

    def __init__(self, method: str, cure: str) -> None:
        self.method, self.cure, self.said = method, cure, False

    def look(self, weights: Tensor, signals: Signals) -> None:
        """Look at the weights of the present tasks, ``[K]``."""
        # A look at weights on a device waits for it, so that there is one now and then.
        if self.said or len(weights) < 2 or not (weights.is_cpu or signals.step % BETWEEN_LOOKS == 0):
            return
        values = weights.tolist()
        position = max(range(len(values)), key=values.__getitem__)
        others = statistics.median(values[:position] + values[position + 1 :])
        if 0 < LARGE * others < values[position]:
            self.said = True
            rank_zero_warn(
                f"{self.method} gives task {signals.tasks[position]!r} {values[position] / others:.2g} times the "
                f"median weight of the others at step {signals.step}, where its loss is "
                f"{float(signals.losses[position]):.2g}: it is learned, or has small units. {self.cure}."
            )
