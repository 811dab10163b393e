"""The names of tasks, which become names of modules and of what is logged, are checked here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_mtl.task.task import Task


def check_task_name(task: object) -> None:
    """Task names become names of modules and of what is logged; refuse those that cannot be both."""
    rule = "Task names become names of modules: a non-empty string without dots that is no attribute of nn.ModuleDict"
    if not isinstance(task, str) or not task or "." in task:
        raise ValueError(f"{task!r} cannot name a task. {rule}.")
    if hasattr(nn.ModuleDict(), task):
        raise ValueError(f"{task!r} cannot name a task. {rule}, as {task!r} is; {task + '_task'!r} would do.")
    if task.split("/")[0] == "total":
        raise ValueError(
            f"{task!r} cannot name a task: 'loss/total' is where the sum over the tasks is logged; "
            f"{task.replace('total', 'total_task', 1)!r} would do."
        )


def check_task_names(tasks: Iterable[str]) -> None:
    """Check the names of a module's tasks, one by one and together.

    Raises:
        ValueError: If one cannot name a task, or ``loss/a`` and ``loss/a/b`` would be logged: some loggers keep names
            as files in folders.
    """
    names = list(tasks)
    for task in names:
        check_task_name(task)
    for task in names:
        if inside := [other for other in names if other.startswith(f"{task}/")]:
            raise ValueError(
                f"The task name {inside[0]!r} begins with the name of task {task!r} and a slash, which loggers that "
                "keep a file for each name cannot hold; rename one of them."
            )


def named_tasks(module: str, given: Any) -> dict[str, Task]:  # noqa: ANN401 - what is checked here
    """Read ``{name: Task}``, or names of tasks whose losses ``task_losses`` computes by itself.

    Raises:
        TypeError: If it is neither.
        ValueError: If a name comes twice.
    """
    names = list(given) if isinstance(given, Mapping | list | tuple) else []
    tasks = {name: given[name] if isinstance(given, Mapping) else Task(by_task_losses) for name in names}
    if not names or not all(isinstance(name, str) and isinstance(task, Task) for name, task in tasks.items()):
        raise TypeError(f"{module}(tasks=...) must be a list of one name or more, or {{name: Task}}, found {given!r}.")
    if len(tasks) < len(names):
        raise ValueError(f"{module}(tasks={names}) names a task twice.")
    return tasks


def by_task_losses(prediction: Any, target: Any) -> Tensor:  # noqa: ANN401 - as losses are called
    """Stand for the loss of a task that was given by its name alone.

    Raises:
        ValueError: When it is called.
    """
    raise ValueError("The task was given by its name alone: return its loss from task_losses, or give Task(loss).")
