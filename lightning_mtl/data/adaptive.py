"""A mixing mode whose shares follow the tasks' validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_mtl.control.scores import higher_is_better, metrics_of, scores_of
from lightning_mtl.data.mixing import Drawn, Progress, Sizes
from lightning_mtl.task import Task


def shares_of(gaps: Mapping[str, float], temperature: float, floor: float) -> dict[str, float]:
    r"""Compute :math:`p_k \propto g_k^{1/T}` with :math:`p_k \ge f` and :math:`\sum_k p_k = 1`.

    Shares below the floor are raised to it, and the others divide the rest in proportion. A gap that is not a number
    counts as the mean of the others; where no gap is above 0, all shares are the same.

    Args:
        gaps: ``{task: gap}``, at least 0.
        temperature: T.
        floor: f, at most 1 / K.

    Example:
        >>> shares_of({"age": 0.75, "smile": 0.25, "pose": 0.0}, temperature=1.0, floor=0.25)
        {'age': 0.5, 'smile': 0.25, 'pose': 0.25}
    """
    known = [gap for gap in gaps.values() if not math.isnan(gap)]
    mean = math.fsum(known) / len(known) if known else 1.0
    largest = max(known, default=1.0)
    if not 0 < largest < math.inf:
        return dict.fromkeys(gaps, 1 / len(gaps))
    wanted = {task: ((mean if math.isnan(gap) else gap) / largest) ** (1 / temperature) for task, gap in gaps.items()}
    low: set[str] = set()
    while True:
        rest, total = 1 - floor * len(low), math.fsum(wanted[task] for task in wanted if task not in low)
        shares = {task: floor if task in low else rest * wanted[task] / total for task in wanted}
        below = {task for task, share in shares.items() if task not in low and share < floor}
        if not below:
            return shares
        low |= below


@dataclass(frozen=True)
class Adaptive(Drawn):
    r"""Takes a batch from one task in each step, the more often the further the task is from its goal in validation.

    .. math:: p_k \propto g_k^{1/T}, \quad p_k \ge f, \qquad
        g_k = \begin{cases} \max(0, b_k - s_k) / |b_k| & \text{higher is better} \\
        \max(0, s_k - b_k) / |b_k| & \text{lower is better} \\
        s_k / s_k^0 & \text{lower is better, no baseline} \end{cases}

    with s the newest validation's score, b its ``Task.baseline``, or 1 for a metric that lies in [0, 1] and is better
    when higher, such as accuracy, and :math:`s^0` the score that the first such epoch began with: the ratio
    of losses. Shares change when an epoch begins; all are the same until a validation, and where no task has a
    gap. ``share/<task>`` is logged once an epoch. They are part of a checkpoint, and the same on all ranks.

    Args:
        metric: The name of a metric as it is logged in ``val/<metric>/<task>``, or ``"loss"``; one for all tasks, or
            ``{task: name}``.
        temperature: T, above 0; the higher, the more alike the shares.
        floor: f, the smallest share of a task, at most 1 / K: a task that is done is not forgotten.

    Raises:
        ValueError: If an argument is out of its range; at setup if a task or metric is unknown, no goal follows from
            it, some gaps would be ratios and others not, or a task has no validation data.

    Source: the idea of following the gap to single-task scores is that of Sharma et al., Learning to Multi-Task by
    Active Sampling, ICLR 2018, arXiv:1702.06053, whose agents sample the task that is furthest behind. Deviations:
    shares instead of an agent, once an epoch, with a temperature and a floor.

    Example:
        >>> Adaptive("accuracy", temperature=2, floor=0.1).weights({"age": 9, "smile": 3})
        [1.0, 1.0]
    """

    metric: str | Mapping[str, str]
    temperature: float = field(default=1.0, kw_only=True)
    floor: float = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        if not self.metric or not isinstance(self.metric, str | Mapping):
            raise ValueError(f"Adaptive(metric={self.metric!r}) must be a metric's name, or {{task: name}}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Adaptive(temperature={self.temperature}) must be above 0 and finite.")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"Adaptive(floor={self.floor}) must be between 0 and 1 / the number of tasks.")

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse a floor that the shares of all tasks cannot have, and names that are no task of the data."""
        if self.floor * len(tasks) > 1:
            raise ValueError(
                f"Adaptive(floor={self.floor}) is more than {len(tasks)} tasks can have; use at most {1 / len(tasks)}."
            )
        if isinstance(self.metric, Mapping) and set(self.metric) != set(tasks):
            raise ValueError(
                f"Adaptive(metric=...) names the tasks {sorted(self.metric)}, the training data has {sorted(tasks)}; "
                "name a metric for each of these."
            )

    @property
    def follows(self) -> bool:
        """Return True: the shares come from validation."""
        return True

    def check_goals(self, tasks: Mapping[str, Task], validated: Sequence[str]) -> None:
        """Refuse metrics that no goal follows from, and tasks that are never validated."""
        metrics = metrics_of("Adaptive", self.metric, tasks)
        higher = higher_is_better("Adaptive", metrics, tasks)
        if missing := [task for task in tasks if task not in validated]:
            raise ValueError(
                f"Adaptive({self.metric!r}) follows validation, and there are no validation data of {missing}; give "
                "MultiTaskDataModule(val={task: dataset}) each of them."
            )
        ratios = {name: not higher[name] and metrics[name] not in (task.baseline or {}) for name, task in tasks.items()}
        if len(set(ratios.values())) > 1:
            raise ValueError(
                f"Adaptive({self.metric!r}) would compare gaps to a goal with ratios of losses, which "
                f"{[task for task, is_ratio in ratios.items() if is_ratio]} have for lack of a goal; give these "
                "Task(baseline={metric: score of a model trained on it alone}), too."
            )
        for name, task in tasks.items():
            metric = metrics[name]
            if not higher[name] or metric in (task.baseline or {}):
                continue
            found = task.metric_named(metric)
            if (found.plot_lower_bound, found.plot_upper_bound) != (0.0, 1.0):
                raise ValueError(
                    f"Adaptive({metric!r}) needs a goal for task {name!r}: {type(found).__name__} is not known to lie "
                    f"between 0 and 1. Give Task(baseline={{{metric!r}: ...}}), the score of a model trained on it "
                    "alone, or take accuracy, IoU or the like."
                )

    def weights(self, sizes: Sizes) -> list[float]:
        """Return the same for all tasks: what is so before the first validation."""
        return [1.0] * len(sizes)

    def shares(self, progress: Progress) -> dict[str, float]:
        """Return the shares that follow from the newest validation.

        Raises:
            ValueError: If a task was validated, but its metric gave no number.
        """
        metrics = metrics_of("Adaptive", self.metric, progress.tasks)
        higher = higher_is_better("Adaptive", metrics, progress.tasks)
        newest, gaps = scores_of("Adaptive", progress.newest, metrics), {}
        for name, task in progress.tasks.items():
            metric, score = metrics[name], newest.get(name, math.nan)
            goal = (task.baseline or {}).get(metric, 1.0 if higher[name] else None)
            if goal is not None:
                gap = (goal - score if higher[name] else score - goal) / abs(goal)
            else:
                first = progress.first.get(name, {}).get(metric, math.nan)
                gap = score / first if first > 0 else math.nan
            gaps[name] = gap if math.isnan(gap) else max(0.0, gap)
        return shares_of(gaps, self.temperature, self.floor)
