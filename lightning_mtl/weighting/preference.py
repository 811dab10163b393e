"""How much each task counts before a method weighs it: numbers given by the user, for all tasks or for some."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mtl.method.signals import Signals


def check_preference(method: str, preference: Mapping[str, float] | None) -> dict[str, float]:
    """Check ``{task: number}`` as given to a method, and copy it."""
    for task, number in (preference or {}).items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{method}(preference=...) gives task {task!r} {number}; use a finite number above 0.")
    return dict(preference or {})


def simplex_preference(preference: Mapping[str, float], signals: Signals) -> Tensor:
    """The present tasks' preference, ``[K]``, float64 on the CPU, scaled to the sum 1; tasks not named count as 1.

    Example:
        >>> simplex_preference({"a": 3.0}, Signals(("a", "b"), torch.ones(2), step=0, epoch=0))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    numbers = torch.tensor([preference.get(task, 1.0) for task in signals.tasks], dtype=torch.float64)
    return numbers / numbers.sum()
