"""Which parameters tasks share, where nobody says it and the graphs of the steps have to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Sharing:
    """The parameters that one task's losses have reached, and those that several tasks' have.

    What is known grows over the steps of a fit: a task may be absent from the first one, and a path may be taken later.
    A parameter that two tasks have reached stays shared.

    Attributes:
        owners: Of each parameter that was reached, the first task that did, as a position among all tasks.
        shared: The parameters that a second task has reached.
        seen: The tasks whose losses were looked at, as positions.

    Example:
        >>> w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        >>> sharing = Sharing()
        >>> sharing.owners.update({w: 0, v: 1})
        >>> sharing.shared.add(w)
        >>> [parameter is w for parameter in sharing.among([v, w])]
        [True]
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a fit, which knows nothing yet."""
        self.owners: dict[Tensor, int] = {}
        self.shared: set[Tensor] = set()
        self.seen: set[int] = set()

    @property
    def size(self) -> int:
        """A number that grows with all that is learned."""
        return len(self.owners) + len(self.shared) + len(self.seen)

    def among(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of the parameters that are shared, in their order."""
        return [parameter for parameter in parameters if parameter in self.shared]

    def is_settled(self, parameters: Iterable[Tensor]) -> bool:
        """Whether nothing more can be learned about these parameters: all that train are shared."""
        return all(parameter in self.shared for parameter in parameters if parameter.requires_grad)

    def rename(self, names: Mapping[Tensor, Tensor]) -> None:
        """Take other tensors for the same parameters, as where sharded ones become whole."""
        self.owners = {names.get(parameter, parameter): owner for parameter, owner in self.owners.items()}
        self.shared = {names.get(parameter, parameter) for parameter in self.shared}

    # What several ranks have learned is put together in one sum.

    def table(self, parameters: Sequence[Tensor], num_tasks: int) -> Tensor:
        """What is known, as integers to be summed over the ranks, ``[P + K, 4]``."""
        table = torch.zeros(len(parameters) + num_tasks, 4, dtype=torch.long)
        for row, parameter in enumerate(parameters):
            if (owner := self.owners.get(parameter)) is not None:
                table[row] = torch.tensor([1, owner, owner**2, int(parameter in self.shared)])
        for task in self.seen:
            table[len(parameters) + task, 0] = 1
        return table

    def take(self, table: Tensor, parameters: Sequence[Tensor]) -> None:
        """Take over what all ranks know together: the sum of their tables."""
        rows = table.tolist()
        for parameter, (ranks, owner, square, shared) in zip(parameters, rows[: len(parameters)], strict=True):
            if not ranks:
                continue
            # The owners of all ranks are one task exactly if the square of their sum is R times the sum of squares.
            if shared or owner**2 != ranks * square:
                self.shared.add(parameter)
            self.owners[parameter] = owner // ranks
        self.seen.update(task for task, (ranks, *_) in enumerate(rows[len(parameters) :]) if ranks)

    # Checkpoints: parameters by their names, tasks by theirs.

    def state(self, module: nn.Module, tasks: Sequence[str]) -> dict[str, Any]:
        """What is known, in plain values."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        return {
            "owners": {names[p]: tasks[owner] for p, owner in self.owners.items() if p in names},
            "shared": [names[p] for p in self.owners if p in self.shared and p in names],
            "seen": [tasks[task] for task in sorted(self.seen)],
        }

    def load(self, state: Mapping[str, Any], module: nn.Module, tasks: Sequence[str]) -> None:
        """Go on with what :meth:`state` gave; parameters and tasks that are gone are left out."""
        parameters, places = dict(module.named_parameters()), {task: place for place, task in enumerate(tasks)}
        self.reset()
        for name, task in state["owners"].items():
            if name in parameters and task in places:
                self.owners[parameters[name]] = places[task]
        self.shared.update(parameters[name] for name in state["shared"] if name in parameters)
        self.seen.update(places[task] for task in state["seen"] if task in places)
