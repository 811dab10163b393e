"""Passes that are no step: a closure's second one, as SAM and LBFGS ask for, and one for buffers alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_mtl.gradients.torch_internals import KEEPING_BUFFERS
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.absent import forget_absent
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.evaluation import second_look
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.update import Update, optimizer_of
from lightning_mtl.training.window import Window


class Passing(Protocol):
    """What passes micro-batches, see :class:`~lightning_mtl.training.step.Optimization`."""

    recorder: Recorder
    update: Update
    cast: Cast

    def pass_batch(self, module: TaskModule, window: Window, batch: object, *, last: bool) -> Tensor | None:
        """Pass one micro-batch forward and backward."""

    def zero_gradients(self, module: TaskModule, batch_idx: int) -> None:
        """Begin a step without gradients."""


def pass_again(passing: Passing, module: TaskModule, window: Window, batch_idx: int) -> Tensor | None:
    """Compute a step's loss and gradients once more, of all its micro-batches and with the weights that it got.

    The weighting is not asked, nothing is logged, counted or shown to a monitor. What a forward pass changes (running
    means, random numbers) changes as in plain training, which passes again for such an optimizer, too.

    Returns:
        The loss: detached, or with its graph where Lightning runs the backward pass.

    Raises:
        ValueError: If the step cannot be repeated.
    """
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "A closure that computes the loss again is not supported where parameters are sharded (FSDP2); use "
            "strategy='ddp', or an optimizer that does not need a closure."
        )
    if not window.keeps_batches:
        raise ValueError(
            "The optimizer called its closure twice, as none of its kind does; derive it from torch.optim.Optimizer "
            "outside of the package torch.optim, or override optimizer_step, so that a step's batches are kept."
        )
    again, labels, automatic = window.again(), passing.recorder.labels, module.automatic_optimization
    if not automatic:
        passing.zero_gradients(module, batch_idx)
    elif window.size > 1:  # Lightning does it for the first micro-batch alone
        optimizer_of(module).zero_grad()
    counting, labels.counting = labels.counting, False
    try:
        with KEEPING_BUFFERS if again.passes_again else nullcontext():
            end = len(window.batches) - 1
            passed = [
                passing.pass_batch(module, again, batch, last=index == end)
                for index, batch in enumerate(window.batches)
            ]
    finally:
        labels.counting = counting
    if automatic:
        passing.update.awaited = again
        losses = [loss for loss in passed if loss is not None]
        return torch.stack(losses).sum() if losses else None
    if again.ranks.size > 1 or len(again.present) < len(module.tasks):
        forget_absent(module, again, passing.cast)
    return again.mean_loss()


@torch.no_grad()
def forward_alone(module: TaskModule, batch: object) -> Tensor:
    """Pass a batch forward where Lightning lets nothing be trained, as weight averaging does for BatchNorm's means."""
    with second_look(module):
        module.present_outputs(batch)
    module.zero_grad()  # in automatic optimization Lightning steps the optimizer all the same
    return torch.zeros((), device=module.device)
