"""What the tasks of a trained model score, and which of it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import lightning.pytorch as pl

from lightning_mtl.module import MultiTaskModule
from lightning_mtl.task import Task

TaskScores = dict[str, dict[str, float]]
"""``{task: {metric: value}}``, ``"loss"`` standing for the task's loss."""
EvaluationStage = Literal["val", "test"]
Directions = dict[str, dict[str, bool]]
"""``{task: {metric: whether higher is better}}``."""


def task_scores(trainer: pl.Trainer, stage: EvaluationStage = "val") -> TaskScores:
    """Read what each task scored in a Trainer's last validation or test: its mean loss and its metrics, unrounded.

    Args:
        trainer: After ``fit`` with validation data, ``validate`` or ``test``.
        stage: ``"val"`` or ``"test"``.

    Returns:
        ``{task: {metric: value}}`` with ``"loss"`` among the metrics; the same on every rank.

    Raises:
        TypeError: If the Trainer's module is no ``MultiTaskModule``.
        ValueError: If it has not been through that stage.

    Example:
        >>> scores = task_scores(trainer)  # doctest: +SKIP
        >>> scores["age"]  # doctest: +SKIP
        {'loss': 0.26, 'MeanAbsoluteError': 5.1}
    """
    module = trainer.lightning_module
    if not isinstance(module, MultiTaskModule):
        raise TypeError(
            f"task_scores reads what a MultiTaskModule recorded; the Trainer holds {type(module).__name__}."
        )
    if not (found := module.recorder.scores[stage]):
        run, data = (
            ("trainer.test", "a test loader") if stage == "test" else ("trainer.validate", "a validation loader")
        )
        raise ValueError(
            f"The Trainer has no {stage} scores: call {run}(module, {data}) first. Strategies that train in processes "
            "of their own, ddp_spawn and ddp_notebook, keep the scores there; use strategy='ddp'."
        )
    return {task: dict(values) for task, values in found.items()}


def metric_directions(tasks: Mapping[str, Task], metrics: Sequence[str] | None = None) -> Directions:
    """Say which of each task's scores are compared, and which way is better.

    Args:
        tasks: The tasks.
        metrics: Names to compare, each task by those that it has; ``"loss"`` may be among them. None takes every metric
            that says whether higher is better, and the loss of a task without one.

    Raises:
        ValueError: If a task has none of the named metrics, or one that does not say whether higher is better.

    Example:
        >>> from torch.nn.functional import l1_loss
        >>> metric_directions({"age": Task(l1_loss)})
        {'age': {'loss': False}}
    """
    directions: Directions = {}
    for name, task in tasks.items():
        own = {str(metric): held.higher_is_better for metric, held in task.metric_collection().items()}
        if metrics is None:
            chosen = [metric for metric, direction in own.items() if direction is not None] or ["loss"]
        else:
            chosen = [metric for metric in metrics if metric == "loss" or metric in own]
        if not chosen:
            raise ValueError(
                f"metrics={list(metrics or [])} has none of task {name!r}, which can be compared by "
                f"{sorted(['loss', *own])}."
            )
        directions[name] = {metric: task.higher_is_better(metric) for metric in chosen}
    return directions


def chosen_scores(scores: TaskScores, directions: Directions) -> TaskScores:
    """Keep the scores that are compared.

    Raises:
        ValueError: If one of them is missing.
    """
    missing = [
        f"{metric} of {task}"
        for task, metrics in directions.items()
        for metric in metrics
        if metric not in scores.get(task, {})
    ]
    if missing:
        found = {task: sorted(values) for task, values in scores.items()}
        raise ValueError(
            f"There is no score for {', '.join(missing)}, only {found}. A task needs labeled samples in the "
            "evaluation data; a metric that computes several values is left out with metrics=[...]."
        )
    return {task: {metric: scores[task][metric] for metric in metrics} for task, metrics in directions.items()}
