"""The training step's own callbacks begin a fit, and end the steps that Lightning takes."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.absent import forget_unreached
from lightning_mtl.training.step import Optimization


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
