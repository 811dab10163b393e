"""Modules and callbacks whose tasks stop at a known validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from lightning_mtl.control import TaskEarlyStopping
from tests.small import Batch, batches, small

TASKS = ("a", "b", "c")
NEVER = 10_000
TRAIN, VAL = batches(4, 5, 6, 4, tasks=TASKS), batches(6, seed=30, tasks=TASKS)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.3)


def after_two(task: str = "b", **arguments: Any) -> TaskEarlyStopping:
    """Stops one task with its second validation: nothing is an improvement of a million."""
    settings: dict[str, Any] = {"patience": dict.fromkeys(TASKS, NEVER) | {task: 1}, "min_delta": 1e6}
    return TaskEarlyStopping("loss", **(settings | arguments))


class Lacking(MultiTaskModule):
    """Trains on batches without labels of one task, from the third epoch on."""

    lacks = "b"

    def task_losses(self, batch: Batch) -> Any:
        inputs, targets = batch
        if self.trainer.training and self.trainer.current_epoch >= 2:
            targets = {task: target for task, target in targets.items() if task != self.lacks}
        return super().task_losses((inputs, targets))


class Detached(MultiTaskModule):
    """Plain PyTorch's way, from the third epoch on: one head reads features that are detached."""

    lacks = "b"

    def task_losses(self, batch: Batch) -> Any:
        inputs, targets = batch
        features = self.trunk(inputs)
        alone = self.trainer.training and self.trainer.current_epoch >= 2
        return {
            task: mse_loss(self.heads[task](features.detach() if alone and task == self.lacks else features), target)
            for task, target in targets.items()
        }


class Scripted(MultiTaskModule):
    """Scores what a script says, one value a validation."""

    script: Mapping[str, Sequence[float]] = {}

    @property
    def stage_scores(self) -> dict[str, dict[str, dict[str, float]]]:
        epoch = self.trainer.current_epoch
        scores = {task: {"loss": values[epoch]} for task, values in self.script.items() if epoch < len(values)}
        return {"train": {}, "val": scores, "test": {}}


def scripted(script: Mapping[str, Sequence[float]]) -> MultiTaskModule:
    """A module with these tasks and validation losses."""
    return small(script, cls=type("Told", (Scripted,), {"script": script}))


def head_of(module: MultiTaskModule, task: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.heads[task].parameters()]
