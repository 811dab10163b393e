"""A fit whose mixing follows validation, alone or as one of a pair."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.data import Adaptive, MultiTaskDataModule
from tests.distributed.table import DDP
from tests.training import flat_parameters, quiet_trainer

TASKS = ("a", "b", "c")


class Watch(Callback):
    """Notes the tasks of each step, the shares of each epoch, and what validation found."""

    def __init__(self) -> None:
        self.tasks: list[list[str]] = []
        self.shares: list[dict[str, float] | None] = []
        self.scores: list[dict[str, dict[str, float]]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.tasks.append([])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.tasks:  # resumed in the middle of an epoch
            self.tasks.append([])
        self.tasks[-1] += list(batch)
        if len(self.tasks[-1]) == 1:
            self.shares.append(trainer.datamodule.shares)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.scores.append({task: dict(found) for task, found in pl_module.stage_scores["val"].items()})


def dataset(task: str, size: int, seed: int) -> TensorDataset:
    """Task a is easy, b is noise, c lies between."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, generator=generator)
    noise = torch.randn(size, generator=generator)
    target = inputs[:, 0] + {"a": 0.0, "b": 50.0, "c": 1.0}[task] * noise
    return TensorDataset(inputs, (target > 0).float()[:, None])


def data(mixing: Any, **arguments: Any) -> MultiTaskDataModule:
    train = {task: dataset(task, 40, 10 + place) for place, task in enumerate(TASKS)}
    val = {task: dataset(task, 50, 20 + place) for place, task in enumerate(TASKS)}
    settings: dict[str, Any] = {"mixing": mixing, "batch_size": 8, "seed": 3, "steps_per_epoch": 20}
    return MultiTaskDataModule(train, val, **(settings | arguments))


def module(baseline: dict[str, float] | None = None) -> MultiTaskModule:
    torch.manual_seed(2)
    metrics = MetricCollection({"accuracy": BinaryAccuracy()})
    task = Task(binary_cross_entropy, metrics, baseline)
    heads = {task: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for task in TASKS}
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    return MultiTaskModule(
        trunk, heads, dict.fromkeys(TASKS, task), optimizer=functools.partial(torch.optim.SGD, lr=0.3)
    )


def adapted(rank: int = 0, ranks: int = 1) -> tuple[list[Any], list[Any], Tensor]:
    """The shares, the order of tasks and the parameters of a fit."""
    watch, model = Watch(), module()
    trainer = quiet_trainer(devices=ranks, strategy="auto" if ranks == 1 else DDP(), max_epochs=4, callbacks=[watch])
    given = data(Adaptive("accuracy"), batch_size=8 // ranks)
    trainer.fit(model, datamodule=given)
    return watch.shares, watch.tasks, flat_parameters(model)
