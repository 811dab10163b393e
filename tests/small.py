"""The smallest module with two tasks, and batches for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task

TASKS = ("a", "b")
Batch = tuple[Tensor, dict[str, Tensor]]


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())


def heads(tasks: Iterable[str] = TASKS) -> dict[str, nn.Module]:
    return {task: nn.Linear(4, 1) for task in tasks}


def regressions(names: Iterable[str] = TASKS) -> dict[str, Task]:
    return {task: Task(mse_loss) for task in names}


def small(
    tasks: Iterable[str] = TASKS, cls: Callable[..., MultiTaskModule] = MultiTaskModule, **arguments: Any
) -> MultiTaskModule:
    """Two regressions and plain descent; with step size 1 a change of a parameter is its gradient."""
    torch.manual_seed(2)
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)}
    names = list(tasks)
    return cls(trunk(), heads(names), regressions(names), **(settings | arguments))


def binary(
    cls: Callable[..., MultiTaskModule] = MultiTaskModule, tasks: Iterable[str] = TASKS, **arguments: Any
) -> MultiTaskModule:
    """Two classifications with an accuracy and an error each."""
    torch.manual_seed(2)
    names = list(tasks)
    metrics = MetricCollection({"accuracy": BinaryAccuracy(), "error": MeanAbsoluteError()})
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=0.3)}
    return cls(
        trunk(),
        {task: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for task in names},
        {task: Task(mse_loss, metrics) for task in names},
        **(settings | arguments),
    )


def batch(number: int = 4, seed: int = 5, tasks: Iterable[str] = TASKS) -> Batch:
    """Inputs and targets, the latter 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 3, generator=generator)
    return inputs, {task: torch.randint(2, (number, 1), generator=generator).float() for task in tasks}


def batches(*sizes: int, seed: int = 5, tasks: Iterable[str] = TASKS) -> list[Batch]:
    return [batch(number, seed + position, tasks) for position, number in enumerate(sizes)]
