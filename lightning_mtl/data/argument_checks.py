"""What a data module refuses: wrong names, wrong numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mtl.data.mixing import check_mixing


def per_task(value: int | Mapping[str, int], task: str) -> int | None:
    """The number for a task, of one number for all or of ``{task: number}``.

    Example:
        >>> per_task(32, "a"), per_task({"a": 16}, "a"), per_task({"a": 16}, "b")
        (32, 16, None)
    """
    return value.get(task) if isinstance(value, Mapping) else value


def check_arguments(
    given: Mapping[str, Any],
    mixing: object,
    batch_size: int | Mapping[str, int],
    num_workers: int | Mapping[str, int],
    steps_per_epoch: int | None,
    seed: int | None,
) -> None:
    """Check the arguments of :class:`~lightning_mtl.data.MultiTaskDataModule`, the data themselves aside."""
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
    _check_numbers("batch_size", batch_size, tasks, 1)
    _check_numbers("num_workers", num_workers, tasks, 0)
    if steps_per_epoch is not None:
        _check_number("steps_per_epoch", steps_per_epoch, 1)
    if seed is not None:
        _check_number("seed", seed, 0)
    check_mixing(mixing)
    if train is not None:
        mixing.check(list(train))  # type: ignore[attr-defined]  # a mode: just checked


def _check_numbers(name: str, value: int | Mapping[str, int], tasks: Mapping[str, None], least: int) -> None:
    if not isinstance(value, Mapping):
        _check_number(name, value, least)
        return
    if tasks and (unknown := [task for task in value if task not in tasks]):
        raise ValueError(f"{name} names {unknown}, but the tasks of the data are {list(tasks)}.")
    for task, number in value.items():
        _check_number(f"{name}[{task!r}]", number, least)


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, found {value!r}.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


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
