"""A trunk may say more of itself than its forward pass does; an ordinary module says nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Penalized(Protocol):
    """A module with terms of its own in the objective; one that holds another such module forwards its terms."""

    def penalties(self) -> dict[str, Tensor]:
        """``{name: scalar}``, added with weight 1 and logged as ``penalty/<name>``."""


class PartlyShared(Protocol):
    """A trunk of which some parameters serve one task alone."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several tasks share."""


class PerTask(Protocol):
    """A trunk that can leave out what only other tasks need; ``{task: features}`` comes back for the named ones."""

    takes_tasks: ClassVar[bool] = True

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Compute the features of ``tasks``, of all of them where it is None."""


# Attributes are asked for by name: a compiled module forwards them, but is no instance of what it holds.


def penalized_parts(trunk: nn.Module) -> list[tuple[str, Penalized]]:
    """The outermost modules in the trunk that have penalties, each with its path; ``""`` is the trunk itself."""
    return list(_outermost(trunk, ""))


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    if callable(getattr(module, "penalties", None)):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{path}.{name}" if path else name)


def penalties_of(parts: Sequence[tuple[str, Penalized]]) -> dict[str, Tensor]:
    """All parts' penalties; a name that several parts use gets each part's path in front.

    Example:
        >>> import torch
        >>> class Norm(nn.Linear):
        ...     def penalties(self):
        ...         return {"norm": self.weight.norm()}
        >>> list(penalties_of(penalized_parts(nn.Sequential(Norm(1, 1), nn.ReLU()))))
        ['norm']
        >>> list(penalties_of(penalized_parts(nn.Sequential(Norm(1, 1), Norm(1, 1)))))
        ['0.norm', '1.norm']
    """
    if len(parts) == 1:
        return dict(parts[0][1].penalties())
    found = [(path, part.penalties()) for path, part in parts]
    names = [name for _, penalties in found for name in penalties]
    return {
        name if names.count(name) == 1 else f"{path}.{name}": value
        for path, penalties in found
        for name, value in penalties.items()
    }
