"""Tasks that rest: they are out of the training of what is shared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resting:
    """The tasks that rest in an optimizer step.

    Attributes:
        dropped: Tasks that count as absent from every training batch.
        head_only: Tasks whose heads train on the shared features, and which give what is shared no gradient.
    """

    dropped: frozenset[str] = frozenset()
    head_only: frozenset[str] = frozenset()


NONE_RESTS = Resting()
