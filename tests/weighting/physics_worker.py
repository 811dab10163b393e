"""Trains a module without a trunk by the schemes of physics, as one process or one of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mtl import TaskOutput, Weighting
from lightning_mtl.weighting import MGDA, LRAnnealing, NTKWeighting, Rotating
from tests.balanced.worker import Flow, batches
from tests.training import flat_parameters, loader, quiet_trainer

MAKES: dict[str, Callable[[], Weighting]] = {
    "Rotating": lambda: Rotating(MGDA()),
    "LRAnnealing": LRAnnealing,
    "NTKWeighting": NTKWeighting,
}


class Residuals(Flow):
    """With numbers to differentiate, whatever they are."""

    def task_losses(self, batch: Any) -> Mapping[str, TaskOutput]:
        outputs = super().task_losses(batch)
        return {task: replace(output, residuals=self.scale * self.net(batch[0])) for task, output in outputs.items()}


def train(name: str, accumulate: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """The parameters after a few steps, in some of which a rank lacks a task."""
    torch.manual_seed(5)
    module = Residuals(accumulate).double()
    trainer = quiet_trainer(
        callbacks=[MAKES[name]()],
        precision=64,
        use_distributed_sampler=False,
        **({"devices": ranks, "strategy": "ddp_find_unused_parameters_true"} if ranks > 1 else {}),
    )
    trainer.fit(module, loader(*batches(rank, ranks)))
    return flat_parameters(module)
