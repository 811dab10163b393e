"""The metrics of a stage: fed with batches, computed over all ranks, and compared with baselines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_mtl.distributed import sum_over
from lightning_mtl.metrics import delta_m
from lightning_mtl.task.advice import on_metrics
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.task import RESERVED_METRICS, Task, TaskOutput, name_task

Scores = dict[str, dict[str, float]]  # {task: {"loss" or metric: value}}


def update_metrics(
    module: TaskModule, stage: str, outputs: Mapping[str, TaskOutput], step_metric: str | None = None
) -> dict[str, Tensor] | None:
    """Count a batch into the stage's metrics; return each task's own value of ``step_metric`` on it, if asked."""
    collections: nn.ModuleDict = getattr(module, f"{stage}_task_metrics")
    scores: dict[str, Tensor] | None = None if step_metric is None else {}
    for task, output in outputs.items():
        if task not in collections or output.prediction is None or output.target is None:
            continue
        prediction = apply_to_collection(output.prediction, Tensor, Tensor.detach)
        try:
            if scores is None:
                collections[task].update(prediction, output.target)  # type: ignore[operator]
            else:
                scores[task] = collections[task](prediction, output.target)[step_metric].detach()
        except Exception as error:
            metrics = collections[task].items()  # type: ignore[operator]
            name_task(error, "metrics", task, on_metrics(metrics, prediction, output.target))
            raise
    return scores


class StageMetrics:
    """Computes what the metrics of a stage's end come to, and keeps in mind what it has warned of."""

    def __init__(self) -> None:
        self._left_out: set[tuple[str, str]] = set()

    def compute(self, module: TaskModule, stage: str) -> Scores:
        """Compute and reset the metrics of a stage over all ranks; a task without a sample has no entry.

        Raises:
            ValueError: If a task's baseline names what its metrics do not compute, or they compute a reserved name.
        """
        collections = module.stage_metrics(stage)
        updated = torch.tensor([float(any(m.update_called for m in ms.values())) for ms in collections.values()])
        # Every rank has to take part in the metrics' own synchronization, or none.
        counts = sum_over(module.trainer, updated.to(module.device)).tolist()
        scores: Scores = {}
        for (task, metrics), count in zip(collections.items(), counts, strict=True):
            if count:
                scores[task] = self._numbers(task, _compute(task, metrics))
                if stage != "train":
                    _check_baseline(task, module.tasks[task], scores[task])
        return scores

    def _numbers(self, task: str, values: Mapping[str, Any]) -> dict[str, float]:
        numbers = {}
        for name, value in values.items():
            if name in RESERVED_METRICS:
                raise ValueError(f"A metric of task {task!r} computes {name!r}, which the package logs by that name.")
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                numbers[name] = float(value)
            elif (task, name) not in self._left_out:
                self._left_out.add((task, name))
                found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                rank_zero_warn(
                    f"Metric {name!r} of task {task!r} computes {found}, which cannot be logged as one number and is "
                    "left out; wrap it (torchmetrics.ClasswiseWrapper for one value a class), or log it from a "
                    "callback of your own."
                )
        return numbers


def _compute(task: str, metrics: MetricCollection) -> dict[str, Any]:
    with warnings.catch_warnings():
        # A rank without a sample has nothing to compute from but what the others send.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
        try:
            values: dict[str, Any] = metrics.compute()
        except Exception as error:
            name_task(error, "metrics", task)
            raise
    metrics.reset()
    return values


def _check_baseline(task: str, declared: Task, scores: Mapping[str, float]) -> None:
    for name in declared.baseline or {}:
        if name != "loss" and name not in scores:
            raise ValueError(
                f"Task(baseline=...) of task {task!r} names {name!r}, but the numbers that its metrics compute are "
                f"{sorted(scores)}."
            )


def change_from_baselines(
    tasks: Mapping[str, Task], scores: Scores, over: Literal["all", "main"] = "all"
) -> float | None:
    """Compare scores with single-task baselines: delta_m in percent, None where there is nothing to compare."""
    compared = [
        (scores[name][metric], baseline, task.higher_is_better(metric))
        for name, task in tasks.items()
        if over == "all" or task.role == "main"
        for metric, baseline in (task.baseline or {}).items()
        if metric in scores.get(name, {})
    ]
    return delta_m(*zip(*compared, strict=True)) if compared else None
