"""What DDP hands to its communication hook in each way of weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook

from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA, GradNorm, StaticWeights, UncertaintyWeighting
from tests.small import batches, small
from tests.training import loader, quiet_trainer
from tests.weightings import WeightedSum, fixed

UNLIKE = {"a": 2.0, "b": 0.25}
# One for each way in which weights reach the gradients: the method, and micro-batches a step.
WAYS: dict[str, tuple[Callable[[], Weighting | None], int]] = {
    "equal weights": (lambda: None, 1),
    "losses": (UncertaintyWeighting, 1),
    "losses, accumulated": (lambda: StaticWeights(UNLIKE), 2),
    "losses, collected": (lambda: fixed(UNLIKE, "losses"), 2),
    "features": (lambda: MGDA(at="features"), 1),
    "last layer": (GradNorm, 1),
    "trunk": (MGDA, 1),
    "trunk, accumulated": (MGDA, 2),
    "aggregator": (lambda: WeightedSum(UNLIKE), 1),
}


def descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


class Hooked(pl.Callback):
    """Counts the gradients that DDP hands to a communication hook, and compresses them to half precision if asked."""

    def __init__(self, compresses: bool) -> None:
        self.compresses, self.numbers, self.steps = compresses, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, lambda _state, bucket: self._communicate(bucket))  # type: ignore[operator, union-attr]

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1

    def _communicate(self, bucket: Any) -> torch.futures.Future[Tensor]:
        self.numbers += bucket.buffer().numel()
        everybody = dist.group.WORLD
        assert everybody is not None
        if self.compresses:
            return fp16_compress_hook(everybody, bucket)
        return allreduce_hook(everybody, bucket)


def train(name: str, compresses: bool, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train two processes on a half of each batch, or one on all of it."""
    make, accumulate = WAYS[name]
    torch.manual_seed(3)
    module, weighting, hooked = small(accumulate_grad_batches=accumulate, optimizer=descent), make(), Hooked(compresses)
    given = [
        (inputs[rank::ranks], {task: target[rank::ranks] for task, target in targets.items()})
        for inputs, targets in batches(4, 4, 4, 4)
    ]
    callbacks: list[pl.Callback] = [] if weighting is None else [weighting]
    arguments: dict[str, Any] = {}
    if ranks > 1:
        callbacks.append(hooked)
        arguments = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks}
    trainer = quiet_trainer(callbacks=callbacks, use_distributed_sampler=False, **arguments)
    trainer.fit(module, loader(*given))
    parameters = torch.cat([p.detach().flatten() for p in module.parameters()])
    return {"parameters": parameters, "numbers": hooked.numbers, "steps": hooked.steps}
