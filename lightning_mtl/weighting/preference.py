"""Some methods prefer tasks, by positive numbers that the user gives for all of them or for some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import NEGLIGIBLE, Measure, Weighting
from lightning_mtl.method.signals import Signals


def check_preference(method: str, preference: Mapping[str, float] | None) -> dict[str, float]:
    """Check ``{task: number}`` as given to a method, and copy it."""
    for task, number in (preference or {}).items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{method}(preference=...) gives task {task!r} {number}; use a finite number above 0.")
    return dict(preference or {})


class Preferring(Weighting):
    """The base of methods that combine the gradients with a preference on the simplex.

    Args:
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the sum 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``preference`` is not positive, or at setup if it names an unknown task.
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    negligible = NEGLIGIBLE
    by_task: ClassVar[tuple[str, ...]] = ("preference",)

    def __init__(self, *, preference: Mapping[str, float] | None = None, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        self.preference = check_preference(type(self).__name__, preference)

    def on_the_simplex(self, signals: Signals) -> Tensor:
        """The present tasks' preference, ``[K]``, float64 on the CPU, of sum 1."""
        numbers = [self.preference.get(task, 1.0) for task in signals.tasks]
        preference = torch.tensor(numbers, dtype=torch.float64)
        return preference / preference.sum()
