"""A search space gives each hyperparameter a range or a list of choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
"""What a YAML file can hold."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included.

    Args:
        low: The lower bound.
        high: The upper bound.
        log: Whether the logarithm is uniform, for what matters by its order of magnitude.
        integer: Whether only whole numbers count.

    Raises:
        ValueError: If the bounds are not finite, in order, whole for integers, or above 0 for logarithms.

    Example:
        >>> Range(1e-4, 1e-2, log=True)
        Range(low=0.0001, high=0.01, log=True, integer=False)
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low={self.low} must be below high={self.high}, and both finite.")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 where log is true.")
        if self.integer and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError(f"low={self.low} and high={self.high} must be whole where integer is true.")

    def examples(self) -> tuple[Value, ...]:
        """Values to try a configuration with: the bounds."""
        return (int(self.low), int(self.high)) if self.integer else (float(self.low), float(self.high))


@dataclass(frozen=True)
class Choice:
    """One of several values, in no order.

    Args:
        values: Whatever a YAML file can hold, lists and mappings too.

    Raises:
        ValueError: If there is none, or one of them twice.

    Example:
        >>> Choice(("min", "median", "rmse")).values[0]
        'min'
    """

    values: Sequence[Value]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("choices must hold one value at least.")
        if repeated := [value for index, value in enumerate(self.values) if _in(value, self.values[:index])]:
            raise ValueError(f"choices holds {repeated[0]!r} twice.")

    def examples(self) -> tuple[Value, ...]:
        """Values to try a configuration with: all of them."""
        return tuple(self.values)


SearchSpace: TypeAlias = Mapping[str, Range | Choice]
"""``{argument: what it may be}``."""


def _in(value: Value, others: Sequence[Value]) -> bool:
    return any(type(value) is type(other) and value == other for other in others)
