"""Tasks that rest: they are out of the training of what is shared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Resting:
    """The tasks that rest in an optimizer step.

    Attributes:
        dropped: Tasks that count as absent from every training batch.
        head_only: Tasks whose heads train on the shared features, and which give what is shared no gradient.

    Example:
        >>> Resting(dropped=frozenset({"age"})).left(["age", "smile"])
        1
    """

    dropped: frozenset[str] = frozenset()
    head_only: frozenset[str] = frozenset()

    def left(self, tasks: Collection[str]) -> int:
        """How many of these tasks do not rest."""
        return len(set(tasks) - self.dropped - self.head_only)


NONE_RESTS = Resting()
