"""Which seeds have come to scores: those that diverged, the pairs that are left, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from lightning_mtl.metrics import Interval, bootstrap_interval

TaskScores = dict[str, dict[str, float]]
"""``{task: {metric: value}}``, ``"loss"`` standing for the task's loss."""
Directions = dict[str, dict[str, bool]]
"""``{task: {metric: whether higher is better}}``."""


def diverged_scores(tasks: Collection[str]) -> TaskScores:
    """Return the scores of a run that diverged: the losses are no numbers, and no metric was computed."""
    return {task: {"loss": math.nan} for task in tasks}


def chosen_scores(scores: TaskScores, directions: Directions) -> TaskScores:
    """Keep the scores that are compared; those of a task whose loss is not finite are NaN.

    A classifier that returns nothing but NaN still has an accuracy, which is no result of the training.

    Raises:
        ValueError: If one of them is missing.

    Example:
        >>> chosen_scores({"a": {"loss": float("inf"), "accuracy": 0.1}}, {"a": {"accuracy": True}})
        {'a': {'accuracy': nan}}
    """
    chosen: TaskScores = {}
    missing = []
    for task, metrics in directions.items():
        own = scores.get(task, {})
        if not math.isfinite(own.get("loss", 0.0)):
            own = dict.fromkeys(metrics, math.nan)
        missing += [f"{metric} of {task}" for metric in metrics if metric not in own]
        chosen[task] = {metric: own[metric] for metric in metrics if metric in own}
    if missing:
        found = {task: sorted(values) for task, values in scores.items()}
        raise ValueError(
            f"There is no score for {', '.join(missing)}, only {found}. A task needs labeled samples in the "
            "evaluation data; a metric that computes several values is left out with metrics=[...]."
        )
    return chosen


def is_finished(scores: TaskScores) -> bool:
    """Whether all scores of a seed are finite."""
    return all(math.isfinite(value) for own in scores.values() for value in own.values())


def of_seeds(finished: int, asked: int) -> str:
    """Say how many of the seeds have finished, in brackets; nothing where all have.

    Example:
        >>> of_seeds(2, 3), of_seeds(3, 3)
        (' (2 of 3 seeds)', '')
    """
    return "" if finished == asked else f" ({finished} of {asked} seeds)"


def interval_of(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Estimate a mean and its interval over the seeds that are left; all three are NaN where none is."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_interval(values, confidence=confidence)
