"""The base of methods that tell main from auxiliary tasks, as ``Task(role=)`` or an argument says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals


class Auxiliary(Weighting):
    """Weighs auxiliary tasks by what the main ones need; the main tasks keep weight 1.

    Args:
        main: The main task or tasks; None where ``Task(role="auxiliary")`` tells them from the others.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: At setup, if there is no main or no auxiliary task, or ``main`` names an unknown task or
            contradicts the roles.
    """

    weighs_heads: ClassVar[bool] = False

    def __init__(self, main: str | Sequence[str] | None = None, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        self.main = None if main is None else (main,) if isinstance(main, str) else tuple(main)
        self._main: frozenset[str] = frozenset(self.main or ())

    def check(self, pl_module: pl.LightningModule) -> None:
        """Find out which tasks are main."""
        name, tasks = type(self).__name__, pl_module.tasks
        roles: dict[str, str] = {task: found.role for task, found in tasks.items()}  # type: ignore[operator,union-attr]
        said = [task for task, role in roles.items() if role == "auxiliary"]
        if self.main is None:
            if not said:
                raise ValueError(
                    f"{name} needs an auxiliary task, and all of {list(roles)} are main; give one "
                    f'Task(role="auxiliary"), or say {name}(main=...).'
                )
            self._main = frozenset(roles) - frozenset(said)
        elif unknown := [task for task in self.main if task not in roles]:
            raise ValueError(f"{name}(main=...) names {unknown}, but the tasks are {list(roles)}.")
        elif both := [task for task in said if task in self._main]:
            raise ValueError(
                f'{name}(main=...) names {both}, which Task(role="auxiliary") calls auxiliary; leave one of them out.'
            )
        elif said and (left := [task for task in roles if task not in {*self._main, *said}]):
            raise ValueError(
                f"{name}(main=...) leaves out {left}, whose Task(role=) is main beside others' auxiliary; leave main= "
                "out, or name them, too."
            )
        if not self._main or len(self._main) == len(roles):
            lacking, role = ("main", "main") if not self._main else ("auxiliary", "auxiliary")
            raise ValueError(
                f"{name} needs a main and an auxiliary task, and of {list(roles)} none is {lacking}; give one "
                f'Task(role="{role}"), or name in main= some of the tasks and not all.'
            )

    def main_of(self, signals: Signals, like: Tensor) -> Tensor:
        """Tell which of the present tasks are main, by 1 beside 0, ``[K]``, where another tensor is."""
        return self.of_tasks(dict.fromkeys(self._main, 1.0), 0.0, signals, like)

    def has_main(self, signals: Signals) -> bool:
        """Whether a main task is present."""
        return not self._main.isdisjoint(signals.tasks)
