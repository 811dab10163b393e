"""The training step's own callbacks begin a fit, and end the steps that Lightning takes."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.absent import forget_unreached
from lightning_mtl.training.step import Optimization
from lightning_mtl.training.update import finite_if_all


class StepHooks(Callback):
    """Begins a fit anew; the module brings it along.

    Args:
        optimization: What takes the steps.
    """

    def __init__(self, optimization: Optimization) -> None:
        self.optimization = optimization

    def on_fit_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Look at who takes part, and forget what an earlier fit left unfinished."""
        self.optimization.begin(pl_module)


class AutomaticStepHooks(StepHooks):
    """Finishes, in automatic optimization, the steps that Lightning passes backward and takes."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Finish the gradients of a window that is complete."""
        update, cast = self.optimization.update, self.optimization.cast
        if update.awaited is None:
            return
        if cast.ranks.size > 1:
            forget_unreached(pl_module, update.awaited, sharded=cast.sharded)
        update.awaited.gradients = None
        update.awaited = None

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: TaskModule,  # type: ignore[override]
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Take gradients that are not finite away from an optimizer that Lightning steps whatever they are."""
        steering = self.optimization.cast.steering
        zero = torch.zeros((), device=pl_module.device)
        if self.optimization.update.drops or not finite_if_all(optimizer.param_groups, zero).isfinite():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif steering is not None:
            steering.before_step(pl_module, optimizer)
        if steering is not None:
            steering.groups.apply(optimizer)
