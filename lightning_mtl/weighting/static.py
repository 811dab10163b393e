"""StaticWeights are fixed, and set by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals


class StaticWeights(Weighting):
    r"""Weigh the tasks by fixed numbers: importance by hand.

    .. math:: \min_\theta \sum_k w_k L_k

    When: the first thing to run. Equal weights, and a few sets of fixed ones, are what other methods have to beat.

    Args:
        weights: ``{task: w_k}``; tasks not named keep 1, so that no argument at all means equal weights.
        start_step: Optimizer steps with equal weights before.

    Raises:
        ValueError: If a weight is negative or not finite, or at setup if a task is unknown.

    Source: linear scalarization, older than multi-task learning; no paper of its own.

    Example:
        >>> StaticWeights({"depth": 2.0, "normals": 0.5}).weights
        {'depth': 2.0, 'normals': 0.5}
    """

    reads_losses: ClassVar[bool] = False
    by_task: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(self, weights: Mapping[str, float] | None = None, *, start_step: int = 0) -> None:
        super().__init__(start_step=start_step)
        for task, weight in (weights or {}).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"StaticWeights gives task {task!r} the weight {weight}; use a finite number >= 0.")
        self.weights = dict(weights or {})

    def weigh(self, signals: Signals) -> Tensor:
        """Look the present tasks' weights up."""
        return self.of_tasks(self.weights, 1.0, signals, signals.losses)
