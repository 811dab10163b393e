"""Losses of regressions in the targets' own units, so that rows which standardize targets can be compared by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mtl.task import Task
from lightning_mtl.task.task import LossFunction
from lightning_mtl.transfer.finished import Directions, TaskScores
from lightning_mtl.tuning.comparing.rows import Row, is_regression

RAW_LOSS = "raw_loss"


class RawLoss(Metric):
    """Averages a regression's loss in raw units: metrics see raw predictions and targets, whatever the loss sees.

    Args:
        loss: The task's loss, a mean over what it is given.

    Example:
        >>> metric = RawLoss(nn.MSELoss())
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        >>> float(metric.compute())
        2.0
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, loss: nn.Module | LossFunction) -> None:
        super().__init__()
        self.loss = loss
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.total += self.loss(prediction, target).detach() * target.numel()
        self.count += target.numel()

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


def in_raw_units(
    tasks: Mapping[str, Task], directions: Directions, rows: Sequence[Row]
) -> tuple[list[Row], Directions]:
    """Have all rows score regressions by their loss in raw units, too, so that it can be compared now or later.

    ``loss/<task>`` of standardized targets is in units of their variance: beside that of raw targets it would show a
    change where there is none.

    Args:
        tasks: The module's tasks.
        directions: The scores that are compared.
        rows: The rows.

    Returns:
        The rows, and the scores that are compared, with ``"raw_loss"`` in place of ``"loss"`` for these tasks.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        if task.standardize is False and is_regression(task.loss):
            changes[name] = {"metrics": {**dict(task.metric_collection()), RAW_LOSS: RawLoss(task.loss)}}
    renamed = {
        task: {RAW_LOSS if metric == "loss" and task in changes else metric: higher for metric, higher in own.items()}
        for task, own in directions.items()
    }
    return [replace(row, changes=_merged(row.changes, changes)) for row in rows], renamed


def _merged(own: Mapping[str, Mapping[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**own.get(name, {}), **more.get(name, {})} for name in {**own, **more}}


def with_raw_losses(scores: TaskScores, tasks: Mapping[str, Task]) -> None:
    """Take the loss itself where nothing is standardized and ``task_losses`` hands no predictions to the metrics."""
    for name, own in scores.items():
        if tasks[name].standardize is False and RAW_LOSS not in own and tasks[name].has_metric(RAW_LOSS):
            own[RAW_LOSS] = own["loss"]
