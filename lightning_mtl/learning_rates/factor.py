"""The base class of factors of a task's learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.devices import send
from lightning_mtl.method.signals import Signals
from lightning_mtl.method.task_state import TaskState
from lightning_mtl.task.module import TaskModule

Collected = Literal["targets", "predictions"]
"""What a factor may ask to see of the training batches."""


class Factor(TaskState, ABC):
    """Computes one factor of each task's learning rate; a :class:`TaskLearningRate` multiplies several.

    A subclass implements :meth:`values`. What it remembers between steps it declares with :meth:`add_state` and changes
    in :meth:`update`, or in one of the other methods that are told what happens; all of them see the same numbers on
    every rank.

    Raises:
        TypeError: If it is given to the Trainer by itself.

    Example:
        >>> class Difficulty(Factor):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.add_state("newest", torch.tensor(1.0))
        ...
        ...     def update(self, signals):
        ...         self.newest = signals.losses
        ...
        ...     def values(self):
        ...         return self.newest / self.newest.mean()
        >>> difficulty = Difficulty()
        >>> difficulty.reset(["a", "b"])
        >>> difficulty.update(Signals(("a", "b"), torch.tensor([1.0, 3.0]), step=0, epoch=0))
        >>> difficulty.values()
        tensor([0.5000, 1.5000])
    """

    reads_heads: bool = False
    """Whether :meth:`update_heads` wants to be called."""

    @abstractmethod
    def values(self) -> Tensor:
        """Compute the factor of every task from the state, ``[K]``, at least 0; 1 where nothing is known yet."""

    @property
    def collects(self) -> Mapping[Collected, int]:
        """Return what :meth:`update_samples` needs, ``"targets"`` or ``"predictions"``, and of how many samples."""
        return {}

    def check(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:
        """Refuse settings that cannot work, at setup."""

    def update(self, signals: Signals) -> None:
        """Read an optimizer step's measurements; the states hold only the present tasks in the meantime."""

    def update_heads(self, norms: Tensor) -> None:
        """Read the norm of the gradient of each task's head, ``[K]``, nan for a task that is absent."""

    def update_samples(self, what: Collected, values: Tensor) -> None:
        """Read targets or predicted classes of the same samples, ``[K, n]``, nan where a task has none."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a factor that nothing multiplies, and what :meth:`check` refuses."""
        if any(callback is self for callback in trainer.callbacks):  # type: ignore[attr-defined]
            name = type(self).__name__
            raise TypeError(f"{name} is a factor, no callback; give the Trainer TaskLearningRate([{name}(...)]).")
        if stage == "fit" and isinstance(pl_module, TaskModule):  # TaskLearningRate has refused other modules
            self.check(trainer, pl_module)


def moved(before: Tensor, newest: Tensor, decay: float) -> Tensor:
    """Compute the running mean after a new value; where one of the two is nan, the other counts alone.

    Example:
        >>> moved(torch.tensor([1.0, torch.nan, 1.0]), torch.tensor([2.0, 2.0, torch.nan]), decay=0.9)
        tensor([1.1000, 2.0000, 1.0000])
    """
    newest = send(newest, before.device, before.dtype)
    mixed = decay * before + (1 - decay) * newest
    return torch.where(newest.isnan(), before, torch.where(before.isnan(), newest, mixed))
