"""Checks of the data module's arguments: names, numbers, and who divides iterable data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lightning_mtl.data.division import ANSWERS, ShardIterables
from lightning_mtl.data.mixing import Mixing
from lightning_mtl.task.module import TaskModule

T = TypeVar("T")


def value_for_task(value: T | Mapping[str, T], task: str, default: T) -> T:
    """Return a task's value from one for all tasks or from ``{task: value}``, where a task may be left out.

    Example:
        >>> value_for_task(32, "a", 0), value_for_task({"a": 16}, "a", 0), value_for_task({"a": 16}, "b", 0)
        (32, 16, 0)
    """
    return value.get(task, default) if isinstance(value, Mapping) else value


def check_data_arguments(
    given: Mapping[str, Any],
    mixing: object,
    batch_size: int | Mapping[str, int | None] | None,
    num_workers: int | Mapping[str, int],
    steps_per_epoch: int | None,
    shard_iterables: ShardIterables | Mapping[str, ShardIterables],
    seed: int | None,
) -> None:
    """Check the arguments of :class:`~lightning_mtl.data.MultiTaskDataModule`, the data themselves aside."""
    tasks = _check_names_of_data(given)
    for name, size in _each("batch_size", batch_size, tasks).items():
        if size is not None:
            _check_number(name, size, 1)
    for name, number in _each("num_workers", num_workers, tasks).items():
        _check_number(name, number, 0)
    for name, answer in _each("shard_iterables", shard_iterables, tasks).items():
        if repr(answer) not in map(repr, ANSWERS):  # 1 is no answer, though it equals True
            raise ValueError(f"{name}={answer!r} must be one of {', '.join(map(repr, ANSWERS))}.")
    if steps_per_epoch is not None:
        _check_number("steps_per_epoch", steps_per_epoch, 1)
    if seed is not None:
        _check_number("seed", seed, 0)
    if not isinstance(mixing, Mixing):
        raise TypeError(
            f"mixing must be Joint(), RoundRobin(), Proportional(), Ratios({{task: number}}), Adaptive(metric) or "
            f"Schedule({{epoch: mode}}) from lightning_mtl.data, found {mixing!r}."
        )
    if given["train"] is not None:
        mixing.check(list(given["train"]))


def _check_names_of_data(given: Mapping[str, Any]) -> dict[str, None]:
    """The tasks of all stages; refused where they are no names, or not those of the training data."""
    for stage, data in given.items():
        if data is None:
            continue
        if not isinstance(data, Mapping) or not data:
            raise TypeError(f"{stage} must be {{task: dataset or loader}} with an entry or more, found {data!r}.")
        for task in data:
            if not isinstance(task, str):
                raise TypeError(f"{stage} names the task {task!r}, which is no string.")
    tasks = dict.fromkeys(task for data in given.values() if data for task in data)
    train = given["train"]
    for stage, data in given.items():
        if train is not None and data is not None and (unknown := [task for task in data if task not in train]):
            raise ValueError(
                f"{stage} has data of {unknown}, which train does not know: its tasks are {list(train)}. Name them "
                "alike, or evaluate other tasks with a data module of their own."
            )
    return tasks


def _each(name: str, value: T | Mapping[str, T], tasks: Mapping[str, None]) -> dict[str, T]:
    """The values of an argument with the names of errors; an unknown task is refused."""
    if not isinstance(value, Mapping):
        return {name: value}
    if tasks and (unknown := [task for task in value if task not in tasks]):
        raise ValueError(f"{name} names {unknown}, but the tasks of the data are {list(tasks)}.")
    return {f"{name}[{task!r}]": own for task, own in value.items()}


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, found {value!r}.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def check_following(mixing: Mixing, module: TaskModule, task_data: Callable[[Any], Mapping[str, Any] | None]) -> None:
    """Refuse, at setup, a mixing mode that follows tasks whose validation, or data, it will not find.

    Raises:
        ValueError: If the data are named otherwise than the tasks, or the mode refuses.
    """
    if not mixing.follows:
        return
    validated = list((task_data("val") or {}) if module.trainer.limit_val_batches else {})
    mixing.check_goals(module.tasks, validated)
    if set(found := task_data("train") or {}) != set(module.tasks):
        raise ValueError(
            f"{type(mixing).__name__} follows the tasks {list(module.tasks)}, and train has data of {list(found)}; "
            "name the data as the tasks, or mix them by Ratios or Proportional."
        )


def check_names(stage: str, found: Sequence[str], tasks: Sequence[str], *, complete: bool) -> None:
    """Refuse data whose names are not those of the module's tasks."""
    if unknown := [task for task in found if task not in tasks]:
        raise ValueError(
            f"{stage} has data of {unknown}, but the module's tasks are {list(tasks)}. Name both alike, or leave these "
            "data out."
        )
    if complete and (missing := [task for task in tasks if task not in found]):
        raise ValueError(
            f"{stage} has no data of the module's tasks {missing}, only of {list(found)}. Add a dataset for each, or "
            "give the module those tasks alone."
        )
