"""Learns from partial labels of every kind, in one process or as one of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MaskedTarget, MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradNorm, UncertaintyWeighting
from tests.distributed.table import DDP
from tests.training import flat_parameters, loader, quiet_trainer

STEPS, SAMPLES, PIXELS = 10, 8, 3
WEIGHTINGS: dict[str, Callable[[], list[Weighting]]] = {
    "equal": list,
    "losses": lambda: [UncertaintyWeighting()],
    "features": lambda: [MGDA(at="features")],
    "last layer": lambda: [GradNorm()],
    "trunk": lambda: [MGDA()],
}
ACCUMULATE: dict[str, Callable[[], list[Weighting]]] = {"trunk, accumulated": lambda: [MGDA()]}


class PerPixel(nn.Module):
    """Classes of a row of pixels, ``[B, 3, PIXELS]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3 * PIXELS)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layer(features).unflatten(1, (3, PIXELS))
        return result


def module(**arguments: Any) -> MultiTaskModule:
    torch.manual_seed(4)
    error = MetricCollection({"error": MeanSquaredError()})
    accuracy = MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro")})
    heads = {"columns": nn.Linear(6, 2), "classes": nn.Linear(6, 3), "masked": nn.Linear(6, 1), "pixels": PerPixel()}
    tasks = {
        "columns": Task(mse_loss, error, missing=torch.nan),
        "classes": Task(cross_entropy, accuracy, missing=-100),
        "masked": Task(mse_loss, error),
        "pixels": Task(cross_entropy, accuracy, missing=255, class_dim=1),
    }
    trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    model = MultiTaskModule(trunk, heads, tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.1), **arguments)
    return model.double()


def batches(rank: int, ranks: int) -> list[Any]:
    """A rank's samples, r, r + ranks, ..., of batches that are the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    given = []
    for step in range(STEPS):
        rare = torch.arange(SAMPLES) % 2 == step % 2 if step % 3 else torch.arange(SAMPLES) < 0
        columns = draw(SAMPLES, 2)
        classes = torch.randint(3, (SAMPLES,), generator=generator)
        pixels = torch.randint(3, (SAMPLES, PIXELS), generator=generator)
        targets: dict[str, Any] = {
            "columns": columns.masked_fill(draw(SAMPLES, 2) < 0.5, torch.nan),
            "classes": classes.masked_fill(~rare, -100),  # missing on one rank, or on both
            "masked": MaskedTarget(draw(SAMPLES, 1), draw(SAMPLES) < 0.4),
            "pixels": pixels.masked_fill(draw(SAMPLES, PIXELS) < 0.5, 255),
        }
        mine = slice(rank, None, ranks)
        cut = {
            task: MaskedTarget(target.target[mine], target.labeled[mine])
            if isinstance(target, MaskedTarget)
            else target[mine]
            for task, target in targets.items()
        }
        given.append((draw(SAMPLES, 5)[mine], cut))
    return given


def train(name: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train with one kind of weighting."""
    make = (WEIGHTINGS | ACCUMULATE)[name]
    model = module(accumulate_grad_batches=2 if name in ACCUMULATE else 1)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="auto" if ranks == 1 else DDP(),
        callbacks=[*make()],
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader(*batches(rank, ranks)), loader(*batches(rank, ranks)))
    return {
        "parameters": flat_parameters(model),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
