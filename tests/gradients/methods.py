"""Weightings of every class, whose weights depend on what was measured and can be computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_mtl import Aggregator, Signals, Weighting

HEADS = (1.5, -0.25, 0.75)


def curve(values: Tensor) -> Tensor:
    """Weights of both signs: bounded and smooth, so that rounding errors stay rounding errors."""
    return torch.linspace(0.9, -0.4, len(values), dtype=torch.float64) + torch.tanh(values.double())


class FromLosses(Weighting):
    def weigh(self, signals: Signals) -> Tensor:
        return curve(signals.losses)


class FromLossesSharedOnly(FromLosses):
    weighs_heads: ClassVar[bool] = False


class FromNorms(Weighting):
    measures: ClassVar[Literal["norms"]] = "norms"

    def weigh(self, signals: Signals) -> Tensor:
        assert signals.norms is not None
        return curve(signals.norms)


class FromNormsSharedOnly(FromNorms):
    weighs_heads: ClassVar[bool] = False


class FromGramian(Weighting):
    measures: ClassVar[Literal["gramian"]] = "gramian"

    def weigh(self, signals: Signals) -> Tensor:
        assert signals.gramian is not None
        return curve(signals.gramian.sum(1))


class FromGramianSharedOnly(FromGramian):
    weighs_heads: ClassVar[bool] = False


class OwnHeads(FromGramianSharedOnly):
    """Has numbers of its own for the heads."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("scales", torch.tensor(1.0, dtype=torch.float64))
        self.scales: Tensor

    def reset(self, *arguments: Any, **named: Any) -> None:
        super().reset(*arguments, **named)
        self.scales = torch.tensor(HEADS[: len(self.scales)], dtype=torch.float64)

    def head_weights(self) -> Tensor:
        return self.scales


class Summed(Aggregator):
    """A fixed combination of the rows; importance doubles those of task a."""

    factors = (0.3, -1.2, 0.8)

    def __init__(self, *, at: Literal["trunk", "features"] = "trunk") -> None:
        super().__init__(at=at, importance={"a": 2.0})

    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        return torch.tensor(self.factors[: len(rows)], dtype=rows.dtype) @ rows


class Agreeing(Aggregator):
    """Sums the elements on whose sign all tasks agree, and leaves the others out: no weighted sum."""

    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        return agreeing(rows)


def agreeing(rows: Tensor) -> Tensor:
    return rows.sum(0) * ((rows > 0).all(0) | (rows < 0).all(0))


@dataclass(frozen=True)
class Method:
    """A weighting with the factors of the heads that follow from its weights."""

    make: Callable[..., Weighting]

    def heads(self, weighting: Weighting, weights: Mapping[str, float]) -> dict[str, float]:
        """What multiplies each task's gradient in parameters that are not shared."""
        if isinstance(weighting, OwnHeads):
            return {task: HEADS["abc".index(task)] for task in weights}
        if not weighting.weighs_heads:
            return dict.fromkeys(weights, 1.0)
        # A task without a gradient where it is measured has the weight 0, and its head the mean of the others', each
        # before its importance.
        factors = {task: weighting.importance.get(task, 1.0) for task in weights}
        others = [weight / factors[task] for task, weight in weights.items() if weight != 0]
        return {t: w if w != 0 else factors[t] * sum(others) / len(others) for t, w in weights.items()}
