"""The weighted sum in a LightningModule of its own: what one would write without the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from tests.small import Batch, small

WEIGHTS = {"a": 2.0, "b": 0.25}


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Plain(pl.LightningModule):
    """The same parameters as :func:`tests.small.small`, in automatic optimization."""

    def __init__(self, configure: Callable[[Any], Any] = momentum, lr: float = 0.05) -> None:
        super().__init__()
        ours: MultiTaskModule = small()
        self.trunk, self.heads, self.configure, self.lr = ours.trunk, ours.heads, configure, lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        z = self.trunk(inputs)
        return torch.stack([WEIGHTS[k] * mse_loss(self.heads[k](z), y) for k, y in targets.items()]).sum()

    def configure_optimizers(self) -> Any:
        optimizer = self.configure(self.parameters())
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ():
            group["lr"] = self.lr
        return optimizer
