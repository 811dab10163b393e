"""What a callback or a mixing mode follows of each task in validation, checked against what the tasks declare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mtl.task import Task
from lightning_mtl.task.module import TaskModule

Mode = Literal["min", "max"]
T = TypeVar("T")


def metrics_of(owner: str, metrics: str | Mapping[str, str], tasks: Mapping[str, Task]) -> dict[str, str]:
    """The metric that is followed of each task.

    Args:
        owner: Who follows it, for errors.
        metrics: One name for all tasks, or ``{task: name}``.
        tasks: All tasks of the module.

    Raises:
        ValueError: If a task is unknown, or lacks the metric.
    """
    check_named(owner, "metrics", metrics, tasks)
    named = dict.fromkeys(tasks, metrics) if isinstance(metrics, str) else dict(metrics)
    for task, metric in named.items():
        if not tasks[task].has_metric(metric):
            known = ["loss", *tasks[task].metric_collection()]
            raise ValueError(
                f"{owner} follows the metric {metric!r} of task {task!r}, whose metrics are {known}; name one of them, "
                "or add it by Task(metrics={name: metric})."
            )
    return {task: named[task] for task in tasks if task in named}


def check_named(owner: str, argument: str, given: object, tasks: Mapping[str, object]) -> None:
    """Refuse an argument that maps unknown tasks to something."""
    unknown = [task for task in given if task not in tasks] if isinstance(given, Mapping) else []
    if unknown:
        raise ValueError(f"{owner}({argument}=...) names {unknown}, but the tasks are {list(tasks)}.")


def of_task(given: T | Mapping[str, T], task: str, default: T) -> T:
    """A task's value of one for all tasks, or of ``{task: value}``.

    Example:
        >>> of_task(3, "age", 1), of_task({"age": 3}, "smile", 1)
        (3, 1)
    """
    return given.get(task, default) if isinstance(given, Mapping) else given


def higher_is_better(
    owner: str, metrics: Mapping[str, str], tasks: Mapping[str, Task], mode: Mode | Mapping[str, Mode] | None = None
) -> dict[str, bool]:
    """Whether higher is better, for the metric of each task: as the metric says, or as ``mode`` does.

    Raises:
        ValueError: If neither says it, or they contradict each other.
    """
    found = {}
    for task, metric in metrics.items():
        declared = False if metric == "loss" else tasks[task].metric_named(metric).higher_is_better
        asked = of_task(mode, task, None)
        if asked is None and declared is None:
            raise ValueError(
                f"The metric {metric!r} of task {task!r} does not say whether higher is better; give "
                f"{owner}(mode={{{task!r}: 'max'}}), or 'min'."
            )
        if asked is not None and declared is not None and (asked == "max") != declared:
            raise ValueError(
                f"{owner}(mode={asked!r}) contradicts the metric {metric!r} of task {task!r}, which says that "
                f"{'higher' if declared else 'lower'} is better; leave mode out."
            )
        found[task] = bool(declared) if asked is None else asked == "max"
    return found


def tasks_of(owner: str, module: pl.LightningModule) -> dict[str, Task]:
    """The tasks of a module that train.

    Raises:
        TypeError: If it has none.
    """
    if not isinstance(module, TaskModule):
        raise TypeError(
            f"{owner} follows the tasks of a lightning_mtl.MultiTaskModule, found {type(module).__name__}; subclass "
            "MultiTaskModule."
        )
    learned = module.learned_tasks
    return {name: task for name, task in module.tasks.items() if learned is None or name in learned}


def check_validates(owner: str, trainer: pl.Trainer) -> None:
    """Refuse a Trainer that never validates.

    Raises:
        ValueError: If it has no validation loader, or is told to use none of it.
    """
    if not trainer.enable_validation:
        raise ValueError(f"{owner} follows validation, and the Trainer has no validation loader; pass one to fit.")


def counts(trainer: pl.Trainer) -> bool:
    """Whether a validation that has ended is one of a fit, and no sanity check."""
    return not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING


def scores_of(owner: str, scores: Mapping[str, Mapping[str, float]], metrics: Mapping[str, str]) -> dict[str, float]:
    """The score of each followed task among a validation's; a task without samples has none.

    Raises:
        ValueError: If a task was validated, but its metric gave no number.
    """
    found = {}
    for task, metric in metrics.items():
        if task not in scores:
            continue
        if metric not in scores[task]:
            raise ValueError(
                f"{owner} follows the metric {metric!r} of task {task!r}, but validation logs {sorted(scores[task])} "
                "of it; name one of these, or let task_losses return predictions and targets (self.task_output)."
            )
        found[task] = scores[task][metric]
    return found


def check_all_scored(owner: str, scores: Mapping[str, float], metrics: Mapping[str, str]) -> None:
    """Refuse tasks that a fit's first validation has no sample of.

    Raises:
        ValueError: Naming them.
    """
    if missing := [task for task in metrics if task not in scores]:
        raise ValueError(
            f"{owner} follows the tasks {missing}, of which the first validation had no sample; give the validation "
            "data labels of them, or leave them out."
        )


def check_number(owner: str, argument: str, given: object, *, whole: bool = False, least: float = 0) -> None:
    """Refuse what is no finite number of at least ``least``, or no mapping of tasks to such numbers.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    for task, value in (given if isinstance(given, Mapping) else {"": given}).items():
        named = f"{owner}({argument}={{{task!r}: {value!r}}})" if task else f"{owner}({argument}={value!r})"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise TypeError(f"{named} must be {'an int' if whole else 'a number'}.")
        if not least <= value < math.inf:
            raise ValueError(f"{named} must be at least {least} and finite.")
