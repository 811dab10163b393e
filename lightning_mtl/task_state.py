"""State that a callback keeps for each task: declared once, then saved, restored, moved, cut to the present tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class TaskState(Callback):
    """The part of a weighting that remembers."""

    def __init__(self) -> None:
        self.tasks: tuple[str, ...] = ()
        self._states: dict[str, tuple[Tensor, bool]] = {}

    def add_state(self, name: str, default: Tensor, *, per_task: bool = True) -> None:
        """Declare what the method remembers; read and write it as the attribute ``name``.

        It is saved and restored with checkpoints, moved to the module's device, and, where it belongs to tasks, cut to
        the tasks present in a step while :meth:`weigh` and :meth:`update` run.

        Args:
            name: The attribute.
            default: The value at the start of training; for a state with ``per_task``, of one task, so that the
                attribute has shape ``[K, *default.shape]``.
            per_task: Whether the state belongs to the tasks or to the method as a whole.
        """
        if name in self._states or hasattr(type(self), name):
            raise ValueError(f"{type(self).__name__}.add_state({name!r}): the name is taken; choose another.")
        self._states[name] = (default, per_task)
        setattr(self, name, default)

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Begin anew, for these tasks."""
        self.tasks = tuple(tasks)
        for name, (default, per_task) in self._states.items():
            value = default.expand(len(tasks), *default.shape) if per_task else default
            setattr(self, name, value.clone().to(device))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the state to the module's device."""
        for name in self._states:
            setattr(self, name, getattr(self, name).to(pl_module.device))

    @contextmanager
    def only(self, present: Sequence[int]) -> Iterator[None]:
        """Cut the tasks' states to the present ones, and put what became of them back."""
        if len(present) == len(self.tasks):
            yield
            return
        index = list(present)
        whole = {name: getattr(self, name) for name, (_, per_task) in self._states.items() if per_task}
        for name, value in whole.items():
            setattr(self, name, value[index])
        try:
            yield
        finally:
            for name, value in whole.items():
                setattr(self, name, value.index_copy(0, torch.tensor(index, device=value.device), getattr(self, name)))

    # Checkpoints. One key for all weightings, so that a checkpoint of another method is noticed.

    @property
    def state_key(self) -> str:
        """The key of every weighting's state in a checkpoint."""
        return "lightning_mtl.Weighting"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the method's name, the tasks' names and the declared states."""
        return {
            "weighting": type(self).__name__,
            "tasks": list(self.tasks),
            "state": {name: getattr(self, name).detach().clone() for name in self._states},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is another method's, or of other tasks.
        """
        name = type(self).__name__
        if state_dict["weighting"] != name:
            raise ValueError(
                f"The checkpoint was written with {state_dict['weighting']}, the Trainer holds {name}; "
                f"resume with {state_dict['weighting']}, or load the model's weights alone to go on with {name}."
            )
        if self.tasks and state_dict["tasks"] != list(self.tasks):
            raise ValueError(
                f"The checkpoint's {name} balanced the tasks {state_dict['tasks']}, the module has {list(self.tasks)}; "
                "resume with the same tasks, or load the model's weights alone."
            )
        if state_dict["state"].keys() != self._states.keys():
            raise ValueError(
                f"The checkpoint's {name} holds the states {sorted(state_dict['state'])}, this one has "
                f"{sorted(self._states)}; construct it with the arguments of the interrupted run."
            )
        self.tasks = tuple(state_dict["tasks"])
        for key, value in state_dict["state"].items():
            setattr(self, key, value.to(getattr(self, key).device))
