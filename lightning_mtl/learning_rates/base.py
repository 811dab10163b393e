"""What the training step asks of learning rates of the tasks' own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_mtl.method.signals import Signals
from lightning_mtl.method.task_state import TaskState

Collected = Literal["targets", "predictions"]


class TaskRates(TaskState, ABC):
    """Gives each task a multiplier of its learning rate; the base of ``learning_rates.TaskLearningRate``.

    The module calls it, in this order, once an optimizer step: :meth:`current` before the step, then, with what the
    step has shown, the ``observe`` methods. Steps that are skipped are not observed.
    """

    key_prefix: ClassVar[str] = "lightning_mtl.TaskRates:"
    takes_any_checkpoint: ClassVar[bool] = True
    shares_trunk: bool = False
    """Whether a task's multiplier also multiplies its weight in the gradient of the shared parameters."""

    @abstractmethod
    def current(self, step: int) -> Tensor:
        """The multipliers of optimizer step ``step``, ``[K]`` for all tasks, float64 on the CPU, none negative."""

    @abstractmethod
    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, at setup, what cannot work."""

    @property
    def reads_heads(self) -> bool:
        """Whether :meth:`observe_heads` wants to be called."""
        return False

    @property
    def collects(self) -> Mapping[Collected, int]:
        """What :meth:`observe_samples` wants, and how many samples of it."""
        return {}

    def observe(self, signals: Signals, present: Sequence[int]) -> None:
        """Take in a step's measurements of the present tasks."""

    def observe_heads(self, norms: Tensor) -> None:
        """Take in the norms of the gradients of all heads, ``[K]``, nan where a head has none."""

    def observe_samples(self, what: Collected, values: Tensor) -> None:
        """Take in targets or predicted classes of the same samples, ``[K, n]``, nan where a task has none."""

    # What is the same for all of them.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Meet the module's tasks; refuse what cannot work.

        Raises:
            TypeError: If the module has no tasks.
            ValueError: If the Trainer holds several, or :meth:`check` refuses.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, TaskRates)]
        if len(others) > 1:
            raise ValueError(
                f"The Trainer holds {len(others)} callbacks for tasks' learning rates; give one of them all factors."
            )
        tasks = getattr(pl_module, "tasks", None)
        if not isinstance(tasks, Mapping):
            raise TypeError(
                f"{type(self).__name__} scales the learning rates of the tasks of a lightning_mtl.MultiTaskModule, "
                f"found {type(pl_module).__name__}; subclass MultiTaskModule."
            )
        if stage == "fit":
            self.check(trainer, pl_module)
            if trainer.global_step == 0 or self.tasks != tuple(tasks):
                self.reset(list(tasks))
        super().setup(trainer, pl_module, stage=stage)


def task_rates_of(trainer: pl.Trainer) -> TaskRates | None:
    """The callback for learning rates of the tasks' own among a Trainer's callbacks, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, TaskRates)), None)
