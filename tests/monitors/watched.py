"""A module whose training leaves traces everywhere, and all monitors that look at it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from lightning_mtl import Monitor, MultiTaskModule, Task
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity, Throughput

TASKS = ("kind", "size", "pose")


class Leaky(nn.Module):
    """Draws random numbers, counts in buffers, and recomputes a part in the backward pass, which counts again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.second, self.first(inputs), use_reentrant=False)
        return found


def module(**arguments: Any) -> MultiTaskModule:
    torch.manual_seed(3)
    return MultiTaskModule(
        Leaky(),
        {"kind": nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 3)), "size": nn.Linear(8, 1), "pose": nn.Linear(8, 2)},
        {"kind": Task(cross_entropy), "size": Task(mse_loss), "pose": Task(mse_loss)},
        **({"optimizer": functools.partial(torch.optim.Adam, lr=0.01)} | arguments),
    )


def batches(count: int, *, partial: bool = False) -> list[Any]:
    """Batches of eight samples; with ``partial`` a task has no label in every third."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for index in range(count):
        targets = {
            "kind": torch.randint(3, (8,), generator=generator),
            "size": torch.randn(8, 1, generator=generator),
            "pose": torch.randn(8, 2, generator=generator),
        }
        if partial and index % 3 == 1:
            del targets["pose"]
        found.append((torch.randn(8, 6, generator=generator), targets))
    return found


def every_monitor(
    every_n_steps: int = 1, names: Sequence[str] = ("trunk.first", "trunk.second"), **arguments: Any
) -> list[Monitor]:
    """At every place, in every form."""
    options = {"figure": False} | arguments
    return [
        GradientConflict(every_n_steps, **options),
        GradientConflict(every_n_steps, at="features", name="at_features", **options),
        GradientConflict(every_n_steps, at="last_layer", name="at_last_layer", **options),
        GradientConflict(every_n_steps, at=names, name="at_names", **options),
        TaskAffinity(every_n_steps, **options),
        TaskAffinity(every_n_steps, exact=True, name="lookahead", **options),
        Convergence(every_n_steps),
        Throughput(every_n_steps),
    ]
