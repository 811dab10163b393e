"""Tasks that stop in a module without a trunk, whose shared parameters are found in the graphs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import BalancedModule
from lightning_mtl.control import TaskEarlyStopping
from lightning_mtl.weighting import MGDA
from tests.control.stopped import NEVER, TASKS
from tests.small import Batch, batches
from tests.training import fit, flat_parameters, loader

TRAIN = batches(4, 4, 4, tasks=TASKS)


class Free(BalancedModule):
    """An encoder under a name of its own; from the third epoch on, a task may be absent or see detached features."""

    instead: str = ""

    def __init__(self) -> None:
        super().__init__(list(TASKS), optimizer=functools.partial(torch.optim.AdamW, lr=0.03, weight_decay=0.3))
        torch.manual_seed(2)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.ends = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        inputs, targets = batch
        features, losses = self.encoder(inputs), {}
        for task, target in targets.items():
            known = features
            if task == "b" and self.trainer.training and self.trainer.current_epoch >= 2:
                if self.instead == "absent":
                    continue
                known = features.detach() if self.instead == "detached" else features
            losses[task] = mse_loss(self.ends[task](known), target)
        return losses


def trained(instead: str, *callbacks: Any) -> BalancedModule:
    module: BalancedModule = type("Module", (Free,), {"instead": instead})()
    fit(module, loader(*TRAIN), loader(*TRAIN), callbacks=list(callbacks), max_epochs=4)
    return module


@pytest.mark.parametrize("method", [list, lambda: [MGDA()]], ids=["equal", "trunk"])
def test_a_dropped_task_is_an_absent_one(method: Any) -> None:
    stopping = TaskEarlyStopping("loss", patience={"a": NEVER, "b": 1, "c": NEVER}, min_delta=1e6)
    found, expected = trained("", stopping, *method()), trained("absent", *method())
    assert torch.equal(flat_parameters(found), flat_parameters(expected))


def test_a_head_alone_reads_detached_features() -> None:
    stopping = TaskEarlyStopping(
        "loss", patience={"a": NEVER, "b": 1, "c": NEVER}, min_delta=1e6, then={"b": "head_only"}
    )
    found, expected = trained("", stopping), trained("detached")
    torch.testing.assert_close(flat_parameters(found), flat_parameters(expected), rtol=1e-5, atol=1e-6)
