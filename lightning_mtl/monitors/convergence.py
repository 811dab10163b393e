"""Reports how each task's training went, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_mtl.method.signals import Signals
from lightning_mtl.monitors.base import Monitor, guarding
from lightning_mtl.monitors.course import Course, describe_course, table_of
from lightning_mtl.monitors.loggers import log_text, loggers_of, step_of
from lightning_mtl.task import Task
from lightning_mtl.task.module import TaskModule


class LossHistory:
    """Keeps losses of K tasks at regular steps in bounded memory: when it is full, every second one is dropped.

    Args:
        num_tasks: K.
        every: Steps between two losses at the beginning.
        capacity: How many losses of a task are kept at most.

    Example:
        >>> history = LossHistory(num_tasks=1, every=1, capacity=4)
        >>> for step in range(6):
        ...     history.add(step, torch.tensor([float(step)]), [0])
        >>> history.steps.tolist(), history.losses[:, 0].tolist()
        ([0, 2, 4], [0.0, 2.0, 4.0])
    """

    def __init__(self, num_tasks: int, every: int, capacity: int = 2048) -> None:
        self.every, self.length = every, 0
        self._steps = torch.zeros(capacity, dtype=torch.long)
        self._losses = torch.zeros(capacity, num_tasks)

    @property
    def steps(self) -> Tensor:
        """Return the steps that were kept, ``[T]``."""
        return self._steps[: self.length]

    @property
    def losses(self) -> Tensor:
        """Return their losses, ``[T, K]``, nan where a task was absent."""
        return self._losses[: self.length]

    def add(self, step: int, losses: Tensor, present: Sequence[int]) -> None:
        """Keep the losses of the present tasks, if the step is one of those to keep."""
        if step % self.every:
            return
        if self.length == len(self._steps):
            self.every *= 2
            kept = (self.steps % self.every == 0).nonzero().flatten()
            self.length = len(kept)
            self._steps[: self.length] = self._steps[kept]
            self._losses[: self.length] = self._losses[kept]
            if step % self.every:
                return
        self._steps[self.length] = step
        self._losses[self.length] = torch.nan
        self._losses[self.length, list(present)] = losses.to(self._losses)
        self.length += 1

    def restore(self, every: int, steps: Tensor, losses: Tensor) -> None:
        """Take back what another history of the same tasks held."""
        self.every, self.length = every, len(steps)
        self._steps[: self.length], self._losses[: self.length] = steps, losses


Curves = dict[str, list[tuple[int, float]]]


class Convergence(Monitor):
    """Watch how fast each task learns, how steady it becomes, and whether it fits the training data too well.

    When the training ends a table says, for each task, at which step its curve had made ``fraction`` of its way; mean
    and standard deviation of the training loss over the last quarter of the steps; the last training and validation
    losses and the gap between them; and in words what is to be noted: *still falling*, *noisy*, *overfitting since step
    120*, and so on, by the rules of :func:`~lightning_mtl.monitors.describe_course`. It goes to Lightning's log and, as
    text ``convergence``, to TensorBoard; the numbers are logged as ``convergence/steps/<task>``,
    ``convergence/late_std/<task>`` and ``convergence/gap/<task>``.

    What it keeps survives an interruption, and stays within 2,048 losses a task however long the training is.

    Args:
        every_n_steps: Note the losses of one optimizer step of n.
        fraction: The fraction of the way from the first loss to the last that is asked for.
        metric: A validation metric to judge the speed by, as it is logged in ``val/<metric>/<task>``; tasks that lack
            it, and None, go by the training loss.

    Raises:
        ValueError: If an argument is out of its range, or at setup if no task has the metric.

    Example:
        >>> Convergence(every_n_steps=10, fraction=0.95).fraction
        0.95
    """

    def __init__(self, every_n_steps: int = 50, *, fraction: float = 0.9, metric: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Convergence(every_n_steps={every_n_steps}) must be at least 1.")
        if not 0 < fraction <= 1:
            raise ValueError(f"Convergence(fraction={fraction}) must lie above 0 and be at most 1.")
        self.every_n_steps = every_n_steps
        self.fraction = fraction
        self.metric = metric
        self.tasks: dict[str, Task] = {}
        self._history = LossHistory(0, every_n_steps)
        self._train: Curves = {}
        self._val: Curves = {}
        self._metric: Curves = {}
        self._epoch_taken: object = None

    def courses(self) -> list[Course]:
        """Describe the course of each task so far."""
        return [self._course(position, name, task) for position, (name, task) in enumerate(self.tasks.items())]

    def _course(self, position: int, name: str, task: Task) -> Course:
        pairs = zip(self._history.steps.tolist(), self._history.losses[:, position].tolist(), strict=True)
        losses = [(step, loss) for step, loss in pairs if loss == loss]  # not a number: the task was absent
        metric = None
        if self.metric is not None and self._metric.get(name):
            metric = self._metric[name], task.higher_is_better(self.metric)
        return describe_course(name, losses, self._train.get(name, []), self._val.get(name, []), self.fraction, metric)

    # What the training calls

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the module's tasks; refuse a metric that none of them has."""
        super().setup(trainer, pl_module, stage)
        tasks = dict(self.tasks_of(pl_module))
        if self.metric is not None and not any(task.has_metric(self.metric) for task in tasks.values()):
            known = sorted({str(name) for task in tasks.values() for name in task.metric_collection()})
            raise ValueError(f"Convergence(metric={self.metric!r}) is no task's metric; the tasks have {known}.")
        if stage == "fit" and (trainer.global_step == 0 or list(tasks) != list(self.tasks)):
            self._history = LossHistory(len(tasks), self.every_n_steps)
            self._train, self._val, self._metric = {}, {}, {}
        self.tasks = tasks

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        """Keep the step's losses."""
        names = list(self.tasks)
        self._history.add(signals.step, signals.losses_on_cpu(), [names.index(task) for task in signals.tasks])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation's losses and metrics."""
        if self.off or trainer.sanity_checking:
            return
        with guarding([self]):
            for name, scores in _scores(pl_module, "val").items():
                _note(self._val, name, trainer.global_step, scores.get("loss"))
                _note(self._metric, name, trainer.global_step, scores.get(self.metric or ""))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the finished epoch's training losses, which are known once all callbacks have ended it."""
        self._take_epoch(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report to the log, to the loggers and to TensorBoard."""
        self._take_epoch(trainer, pl_module)
        if self.off:
            return
        with guarding([self]):
            courses = self.courses()
            table = table_of(courses, self.fraction)
            rank_zero_info(f"Convergence of the tasks:\n{table}")
            scalars = {f"convergence/late_std/{c.task}": c.late_std for c in courses}
            scalars |= {f"convergence/steps/{c.task}": c.steps_to_fraction for c in courses if c.steps_to_fraction}
            scalars |= {f"convergence/gap/{c.task}": c.gap for c in courses if c.gap is not None}
            trainer._logger_connector.log_metrics({name: torch.tensor(float(x)) for name, x in scalars.items()})
            log_text(loggers_of(trainer), "convergence", table, step_of(trainer))

    def _take_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scores = _scores(pl_module, "train")
        if self.off or scores is self._epoch_taken or not scores:
            return
        with guarding([self]):
            self._epoch_taken = scores
            for name, found in scores.items():
                _note(self._train, name, trainer.global_step, found.get("loss"))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far, with the tasks' names."""
        return {
            "tasks": list(self.tasks),
            "every": self._history.every,
            "steps": self._history.steps.clone(),
            "losses": self._history.losses.clone(),
            "curves": [{name: [list(p) for p in points] for name, points in curves.items()} for curves in self._all()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of an interrupted training; curves of other tasks are ignored."""
        if self.tasks and state_dict["tasks"] != list(self.tasks):
            return
        self._history = LossHistory(len(state_dict["tasks"]), self.every_n_steps)
        self._history.restore(state_dict["every"], state_dict["steps"], state_dict["losses"])
        self._train, self._val, self._metric = (
            {name: [(int(step), float(value)) for step, value in points] for name, points in curves.items()}
            for curves in state_dict["curves"]
        )

    def _all(self) -> tuple[Curves, Curves, Curves]:
        return self._train, self._val, self._metric


def _note(curves: Curves, task: str, step: int, value: float | None) -> None:
    points = curves.setdefault(task, []) if value is not None else []
    # A run that resumes from inside an epoch's begin comes by this point again.
    if value is not None and not (points and points[-1][0] == step):
        points.append((step, float(value)))


def _scores(pl_module: pl.LightningModule, stage: str) -> Mapping[str, Mapping[str, float]]:
    return pl_module.stage_scores[stage] if isinstance(pl_module, TaskModule) else {}
