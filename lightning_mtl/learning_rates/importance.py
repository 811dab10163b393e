"""Learning rates by the tasks' importance, or by how far they lag behind."""

from __future__ import annotations

import math
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_mtl.learning_rates.factor import Factor
from lightning_mtl.task import Task
from lightning_mtl.task.module import TaskModule

SMALLEST_SCORE = 1e-3


def lag_factors(lags: Tensor, power: float, largest: float) -> Tensor:
    r"""Compute :math:`\operatorname{clamp}\big( (l_k / \bar l)^p, 1 / F, F \big)`; 1 where a lag is nan.

    Args:
        lags: ``[K]``, at least 0, larger for tasks that are worse. The mean is taken over those that are known.
        power: p.
        largest: F.

    Example:
        >>> lag_factors(torch.tensor([0.1, 0.3, torch.nan]), power=1.0, largest=4.0)
        tensor([0.5000, 1.5000, 1.0000])
    """
    ratios = lags / lags.nanmean()
    factors = (ratios**power).clamp(1 / largest, largest)
    return torch.where(ratios.isnan(), torch.ones_like(factors), factors)


class Importance(Factor):
    r"""Give tasks larger or smaller learning rates: by hand, or larger ones where they lag in validation.

    By hand, :math:`f_k` is the given number. From a metric κ, once a validation:

    .. math:: f_k = \operatorname{clamp}\Big( \big( l_k / \bar l \big)^p, \tfrac{1}{F}, F \Big), \qquad
        l_k = \begin{cases} b_k / \kappa_k & \text{higher is better} \\ \kappa_k / b_k & \text{lower is better} \\
        1 - \kappa_k & \text{without baselines} \end{cases}

    so that the lag :math:`l_k` of a task on a par with its ``Task.baseline`` b is 1, and of one twice as bad 2; where
    higher is better, a score at or below 0 counts as a thousandth of the baseline, a lag of 1,000. Where no task has a
    baseline, κ must be a performance in [0, 1], such as accuracy, and the lag is what is missing to 1. A task without a
    value yet has the factor 1.

    Args:
        weights: ``{task: factor}``; tasks not named keep 1. 0 stops the head.
        metric: The name of a metric of every task, or of the loss, ``"loss"``; or ``{task: name}`` where it differs.
        power: p, how strongly lagging tasks are pulled up.
        largest: F, the bound of the factor.

    Raises:
        ValueError: If not just one of ``weights`` and ``metric`` is given, or a number is out of its range; at setup if
            a task is unknown or lacks the metric, if only some tasks have a baseline for it, if without baselines it is
            no performance in [0, 1], or if the Trainer never validates.

    Source: the rule follows dynamic task prioritization, Guo et al., ECCV 2018, which puts the lag on the losses; see
    :class:`~lightning_mtl.weighting.DTP`.

    Example:
        >>> factor = Importance({"age": 0.5})
        >>> factor.reset(["age", "smile"])
        >>> factor.values()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        metric: str | Mapping[str, str] | None = None,
        power: float = 1.0,
        largest: float = 4.0,
    ) -> None:
        super().__init__()
        if (weights is None) == (metric is None):
            raise ValueError(
                f"Importance(weights={weights!r}, metric={metric!r}) takes one of the two; for both, give "
                "TaskLearningRate two factors."
            )
        for task, weight in (weights or {}).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"Importance(weights=...) gives task {task!r} the factor {weight}; use a finite number >= 0."
                )
        if not 0 <= power <= 10:
            raise ValueError(f"Importance(power={power}) must be between 0 and 10.")
        if not 1 <= largest < math.inf:
            raise ValueError(f"Importance(largest={largest}) must be at least 1 and finite.")
        self.weights = None if weights is None else dict(weights)
        self.metric, self.power, self.largest = metric, power, largest
        if metric is not None:
            self.add_state("lags", torch.tensor(torch.nan))
        self.lags: Tensor

    def metric_of(self, task: str) -> str:
        """Return the name of a task's metric."""
        return self.metric if isinstance(self.metric, str) else (self.metric or {})[task]

    def check(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:
        """Refuse unknown tasks, and metrics that no lag follows from."""
        tasks = pl_module.tasks
        for argument, named in (("weights", self.weights), ("metric", self.metric)):
            if isinstance(named, Mapping) and (unknown := named.keys() - tasks.keys()):
                raise ValueError(
                    f"Importance({argument}=...) names {sorted(unknown)}, but the tasks are {list(tasks)}."
                )
        if self.metric is None:
            return
        if not isinstance(self.metric, str) and (missing := tasks.keys() - self.metric.keys()):
            raise ValueError(f"Importance(metric=...) names no metric for {sorted(missing)}; name one for each task.")
        for name, task in tasks.items():
            if not task.has_metric(self.metric_of(name)):
                known = ["loss", *task.metric_collection()]
                raise ValueError(
                    f"Importance(metric={self.metric_of(name)!r}) is not among the metrics of task {name!r}, {known}; "
                    "give metric={task: name} where they differ."
                )
        with_baseline = [name for name, task in tasks.items() if self.metric_of(name) in (task.baseline or {})]
        if with_baseline and len(with_baseline) < len(tasks):
            without = [name for name in tasks if name not in with_baseline]
            raise ValueError(
                f"Importance(metric=...) compares the tasks by their baselines, which {without} lack for that metric; "
                "give Task(baseline=...) to all of them, or to none."
            )
        for name in with_baseline:
            if (baseline := (tasks[name].baseline or {})[self.metric_of(name)]) < 0:
                raise ValueError(
                    f"Importance(metric=...) divides by the baseline of task {name!r}, {baseline}, which must be above "
                    "0; take a metric that is not negative."
                )
        if not with_baseline:
            self._check_bounded(tasks)

    def _check_bounded(self, tasks: Mapping[str, Task]) -> None:
        for name, task in tasks.items():
            metric = self.metric_of(name)
            found = None if metric == "loss" else task.metric_named(metric)
            bounds = None if found is None else (found.plot_lower_bound, found.plot_upper_bound, found.higher_is_better)
            if bounds != (0.0, 1.0, True):
                raise ValueError(
                    f"Importance(metric={metric!r}) of task {name!r} is no performance between 0 and 1 that is better "
                    "when higher, so that a lag needs something to compare with: give every task "
                    f"Task(baseline={{{metric!r}: ...}}), the score of a model trained on it alone, or take accuracy, "
                    "IoU or the like."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a Trainer that never validates, where the lag comes from validation."""
        super().on_fit_start(trainer, pl_module)
        if self.metric is not None and not trainer.enable_validation:
            raise ValueError(
                "Importance(metric=...) needs a validation loader, and the Trainer has none; pass one, or give weights."
            )

    def values(self) -> Tensor:
        """Return the given factors, or those of the newest validation."""
        if self.weights is not None:
            return torch.tensor([self.weights.get(task, 1.0) for task in self.tasks], dtype=torch.float64)
        return lag_factors(self.lags, self.power, self.largest)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the validation's metrics."""
        if self.metric is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if not isinstance(pl_module, TaskModule):  # for the type alone: setup has refused it
            return
        scores = pl_module.stage_scores["val"]
        newest = [self._lag(name, task, scores.get(name, {})) for name, task in pl_module.tasks.items()]
        found = self.lags.new_tensor(newest)
        self.lags = torch.where(found.isnan(), self.lags, found)

    def _lag(self, name: str, task: Task, scores: Mapping[str, float]) -> float:
        metric = self.metric_of(name)
        value, baseline = scores.get(metric, math.nan), (task.baseline or {}).get(metric)
        if baseline is None:
            return 1 - value
        if not task.higher_is_better(metric):
            return max(value / baseline, 0.0)
        # A score of 0, or below, is no part of the baseline: as far behind as any finite one could be.
        return baseline / max(value, baseline * SMALLEST_SCORE)
