"""The goals of a search: the metrics that it minimizes or maximizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.configured.names import choices
from lightning_mtl.task import Task

Direction = Literal["minimize", "maximize"]


class NotLoggedError(ConfigurationError):
    """Is raised for a goal that the training does not log, so that no trial can reach it."""


@dataclass(frozen=True)
class Goal:
    """Names a logged metric, or several whose mean counts.

    Args:
        metrics: Their names, as logged.
        direction: Minimize or maximize; None where the names show it.

    Example:
        >>> Goal(("val/loss/a", "val/loss/b"), None).value({"val/loss/a": 1.0, "val/loss/b": 2.0})
        1.5
    """

    metrics: tuple[str, ...]
    direction: Direction | None

    @property
    def name(self) -> str:
        """Return the metric's name, or ``mean(...)`` of several."""
        return self.metrics[0] if len(self.metrics) == 1 else f"mean({', '.join(self.metrics)})"

    def value(self, logged: Mapping[str, float]) -> float:
        """Compute the goal's value after a training.

        Raises:
            NotLoggedError: If the training has logged no such metric.
            ValueError: If the value is not finite.
        """
        if missing := [metric for metric in self.metrics if metric not in logged]:
            raise NotLoggedError(f"objective: the training logs no {missing[0]!r}. {choices(missing[0], list(logged))}")
        value = math.fsum(logged[metric] for metric in self.metrics) / len(self.metrics)
        if not math.isfinite(value):
            raise ValueError(f"{self.name} is {value}.")
        return value

    def direction_for(self, tasks: Mapping[str, Task]) -> Direction:
        """Return whether to minimize or maximize, as given or as the metrics' names show.

        Raises:
            ConfigurationError: If neither shows it, or the names disagree.
        """
        if self.direction is not None:
            return self.direction
        found = {_direction(metric, tasks) for metric in self.metrics}
        if len(found) == 1 and (direction := found.pop()) is not None:
            return direction
        said = "{mean: [...], direction: ...}" if len(self.metrics) > 1 else f"{{{self.name}: ...}}"
        raise ConfigurationError(
            f"objective: {self.name} does not say whether higher is better; write {said} with minimize or maximize."
        )


def _direction(metric: str, tasks: Mapping[str, Task]) -> Direction | None:
    """Losses and delta_m are minimized; of a task's metric the task knows."""
    parts = metric.split("/")
    if parts[0] in ("loss", "loss_epoch") or (len(parts) > 1 and parts[1] in ("loss", "delta_m")):
        return "minimize"
    if len(parts) == 3 and parts[2] in tasks:
        task = tasks[parts[2]]
        if not task.has_metric(parts[1]):
            known = ["loss", *(str(name) for name in task.metric_collection())]
            raise ConfigurationError(
                f"objective: task {parts[2]!r} has no metric {parts[1]!r}. {choices(parts[1], known)}"
            )
        try:
            return "maximize" if task.higher_is_better(parts[1]) else "minimize"
        except ValueError:
            return None
    if len(parts) == 3:
        raise ConfigurationError(f"objective: {metric!r} names no task. {choices(parts[2], list(tasks))}")
    return None


def read_goals(objective: Any) -> tuple[Goal, ...]:  # noqa: ANN401 - whatever a YAML file holds
    """Read a metric's name, ``{mean: [names], direction: ...}``, or ``{name: direction, ...}`` for a Pareto front.

    Raises:
        ConfigurationError: If it is none of these.
    """
    if isinstance(objective, str):
        return (Goal((objective,), None),)
    if isinstance(objective, list) and objective and all(isinstance(name, str) for name in objective):
        return tuple(Goal((name,), None) for name in objective)
    if isinstance(objective, Mapping) and objective and objective.keys() <= {"mean", "direction"}:
        names = objective.get("mean")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return (Goal(tuple(names), _read_direction("direction", objective.get("direction"))),)
        raise ConfigurationError(f"objective.mean must list names of metrics, found {names!r}.")
    if isinstance(objective, Mapping) and objective:
        return tuple(Goal((str(name),), _read_direction(str(name), where)) for name, where in objective.items())
    raise ConfigurationError(
        "objective must be the name of a metric, {mean: [names]}, or {name: minimize or maximize, ...}; "
        f"found {objective!r}."
    )


def _read_direction(key: str, found: Any) -> Direction | None:  # noqa: ANN401
    for direction in get_args(Direction):
        if found == direction:
            return cast(Direction, direction)
    if found is None:
        return None
    raise ConfigurationError(f"objective.{key} must be minimize or maximize, found {found!r}.")
