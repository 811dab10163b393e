"""Weightings made for tests: fixed weights that ask for any measurement, and an aggregator that keeps what it saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mtl import Aggregator, Signals, Weighting


class Fixed(Weighting):
    """Answers with given weights and keeps the signals it was asked with."""

    def __init__(self, given: Mapping[str, float], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.given = dict(given)
        self.asked: list[Signals] = []
        self.observed: list[Signals] = []

    def weigh(self, signals: Signals) -> Tensor:
        self.asked.append(signals)
        return torch.tensor([self.given[task] for task in signals.tasks], dtype=torch.float64)

    def update(self, signals: Signals) -> None:
        self.observed.append(signals)


def fixed(given: Mapping[str, float], measures: str, *, weighs_heads: bool = True, **arguments: Any) -> Fixed:
    """A :class:`Fixed` that declares these needs."""
    cls = type("Fixed", (Fixed,), {"measures": measures, "weighs_heads": weighs_heads})
    return cast("Fixed", cls(given, **arguments))


class WeightedSum(Aggregator):
    """Combines rows by given weights and keeps the rows."""

    def __init__(self, given: Mapping[str, float], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.given = dict(given)
        self.rows: list[Tensor] = []

    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        self.rows.append(rows.clone())
        return torch.tensor([self.given[task] for task in signals.tasks], dtype=rows.dtype) @ rows
