"""What the training step does for the callback that gives tasks learning rates of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lightning_mtl.learning_rates.relatedness import aligned, of_all_ranks
from lightning_mtl.learning_rates.task_learning_rate import TaskLearningRate
from lightning_mtl.method.signals import Signals
from lightning_mtl.task import TaskOutput
from lightning_mtl.task.batches import is_per_task
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.group_rates import GroupRates
from lightning_mtl.training.window import Window


class Steering:
    """Takes a step's multipliers to the optimizer, and what the step has shown back.

    Args:
        rates: The callback that gives the multipliers.
        module: What is trained, its optimizer made.

    Raises:
        ValueError: If heads have no parameter groups of their own.

    Attributes:
        groups: The optimizer's groups of the heads.
        effective: The tasks whose heads are in the optimizer, and the learning rates of the newest step.
    """

    def __init__(self, rates: TaskLearningRate, module: TaskModule) -> None:
        self.rates, self.groups = rates, GroupRates()
        self.effective: tuple[list[str], Tensor] | None = None
        self.groups.check(module, _optimizer_of(module), shares_trunk=rates.shares_trunk)

    def shares(self, module: TaskModule, step: int) -> Tensor | None:
        """What multiplies the tasks' weights in the shared gradient of a step, ``[K]``; None for 1."""
        return self.rates.current(step).to(module.device, torch.float32) if self.rates.shares_trunk else None

    def collect(self, module: TaskModule, window: Window, batch: object, outputs: Mapping[str, TaskOutput]) -> None:
        """Keep what is asked for of a micro-batch's targets and predictions."""
        if not self.rates.collects:
            return
        if is_per_task(batch, module.tasks):
            raise ValueError(
                "The relatedness of tasks is measured on targets of the same samples, and each task has samples of its "
                "own where a batch is {task: (inputs, target)}; measure Relatedness('gradient_cosine')."
            )
        for what, limit in self.rates.collects.items():
            newest = aligned(outputs, tuple(module.tasks), what, limit, module.device)
            window.samples.setdefault(what, []).append(newest)

    def choose(self, module: TaskModule, window: Window) -> None:
        """Decide what the step that ends this window multiplies."""
        multipliers = self.rates.current(window.step).tolist()
        self.effective = self.groups.choose(module, _optimizer_of(module), multipliers)

    def before_step(self, module: TaskModule, optimizer: torch.optim.Optimizer) -> None:
        """Show the heads' gradients, finite ones, before they are clipped."""
        if self.rates.reads_heads:
            self.rates.observe_heads(self.groups.gradient_norms(module, optimizer))

    def observe(self, window: Window, signals: Signals) -> None:
        """Show what else the step has measured."""
        self.rates.observe(signals, window.positions(signals.tasks))
        for what, values in window.samples.items():
            self.rates.observe_samples(what, of_all_ranks(values, window.ranks))


def _optimizer_of(module: TaskModule) -> torch.optim.Optimizer:
    return cast("LightningOptimizer", module.optimizers()).optimizer  # several are refused at setup
