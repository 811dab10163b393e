"""What gates, masks and branches say about themselves, and how it is gathered without disturbing the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class GateTable:
    """A matrix with names: how much each task uses of each expert, for instance.

    Attributes:
        values: ``[R, C]``; NaN where there is nothing to say.
        rows: R names, those of tasks as a rule.
        columns: C names, those of experts as a rule.
        limits: The ends of the colour scale; None takes the extremes found.
    """

    values: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    limits: tuple[float, float] | None = (0.0, 1.0)


@runtime_checkable
class ReportsGates(Protocol):
    """A module that can tell what its gates, masks or branches do."""

    def gate_statistics(self) -> Mapping[str, Tensor | GateTable]:
        """Name each statistic: a table, a ``[K]`` tensor with a number a task in the module's order, or a scalar."""


class GateMeter:
    """Running means on the device, filled only while somebody asks for them.

    Numbers are detached and added up where they are; nothing waits for the device before :meth:`mean` is read. The
    meter is no part of a module's state: neither saved, nor sent between ranks, nor of any influence on training.

    Example:
        >>> import torch
        >>> meter = GateMeter()
        >>> meter.gathering = True
        >>> meter.add("a", torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        >>> meter.mean("a")
        tensor([0.7500, 0.2500])
    """

    def __init__(self) -> None:
        self.gathering = False
        self._totals: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}

    def start(self) -> None:
        """Forget what was gathered and begin anew."""
        self.gathering = True
        self._totals, self._samples = {}, {}

    def add(self, name: str, values: Tensor) -> None:
        """Count ``[B, n]`` values, a row a sample."""
        found = values.detach().float()
        total, samples = found.sum(0), found.new_full((), found.shape[0])
        if name in self._totals:
            total, samples = self._totals[name] + total, self._samples[name] + samples
        self._totals[name], self._samples[name] = total, samples

    def mean(self, name: str) -> Tensor | None:
        """The mean over all samples counted, ``[n]``; None without a sample."""
        return self._totals[name] / self._samples[name] if name in self._totals else None


@runtime_checkable
class GathersGates(ReportsGates, Protocol):
    """A module whose statistics are means over the samples it has seen while its meter was gathering."""

    gate_meter: GateMeter
