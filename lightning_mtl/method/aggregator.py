"""Aggregator is the base of methods that combine gradients in another way than by a weighted sum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.signals import Decision, Signals


class Aggregator(Weighting):
    """Combines the tasks' gradients into a direction that no weights describe, element by element for instance.

    A subclass implements :meth:`combine` in place of :meth:`weigh`; heads get their own tasks' gradients, unweighted.
    No weights exist to keep or to log.

    Args:
        importance: ``{task: factor}``, multiplied into the rows; tasks not named keep 1.
        start_step: Optimizer steps with equal weights before the method begins.
        at: Where gradients are taken: ``"trunk"`` (all shared parameters) or ``"features"`` (the trunk's output).

    Raises:
        ValueError: If ``at`` is another place, an argument is out of its range, or, at setup, ``importance`` names an
            unknown task.

    Example:
        >>> class Median(Aggregator):
        ...     def combine(self, signals, rows):
        ...         return rows.median(dim=0).values
        >>> rows = torch.tensor([[1.0], [5.0], [2.0]])
        >>> Median().combine(Signals(("a", "b", "c"), torch.ones(3), step=0, epoch=0), rows)
        tensor([2.])
    """

    measures: ClassVar[Measure] = "rows"
    weighs_heads: ClassVar[bool] = False
    takes_any_rows: ClassVar[bool] = False
    """Whether :meth:`combine` makes of rows that are not finite a direction that is not: such a step is skipped after
    it. All other methods are spared such rows, which takes a look at the device before."""

    def __init__(
        self,
        *,
        importance: Mapping[str, float] | None = None,
        start_step: int = 0,
        at: Literal["trunk", "features"] = "trunk",
    ) -> None:
        if at not in ("trunk", "features"):
            raise ValueError(f"{type(self).__name__}(at={at!r}) must be 'trunk' or 'features'.")
        super().__init__(importance=importance, start_step=start_step, at=at)

    @abstractmethod
    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        """Combine ``rows``, ``[K, n]``, into one direction, ``[n]``."""

    def weigh(self, signals: Signals) -> Tensor:
        """Say that there are no weights."""
        raise TypeError(f"{type(self).__name__} is no weighted sum of gradients; call combine(signals, rows).")

    def decide(
        self, signals: Signals, present: Sequence[int], *, measured: bool, rows: Sequence[Tensor] = ()
    ) -> Decision:
        """Combine the rows, which may lie in several matrices, as if they were one."""
        if not rows:  # before the first step
            return super().decide(signals, present, measured=measured)
        ones, widest = torch.ones_like(signals.losses), rows[0].dtype
        for block in rows[1:]:
            widest = torch.promote_types(widest, block.dtype)
        home = rows[0].device  # of blocks that may lie on several
        whole = rows[0] if len(rows) == 1 else torch.cat([block.to(home, widest) for block in rows], dim=1)
        if self.importance:
            whole = whole * self.with_importance(whole.new_ones(len(whole)), signals)[:, None]
        with self._cut_to(present):
            direction = self.combine(signals, whole).detach()
        parts = direction.split([block.shape[1] for block in rows])
        return Decision(ones, ones, [part.to(block) for part, block in zip(parts, rows, strict=True)])
