"""What the training step does for the callback that gives tasks learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtl.learning_rates.relatedness import aligned, of_all_ranks
from lightning_mtl.method.signals import Signals
from lightning_mtl.task import TaskOutput
from lightning_mtl.task.batches import is_per_task
from lightning_mtl.training.group_rates import GroupRates
from lightning_mtl.training.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class Steering:
    """Takes a step's multipliers to the optimizer, and what the step has shown back; nothing where no callback asks."""

    def __init__(self) -> None:
        self.groups = GroupRates()
        self.effective: tuple[list[str], Tensor] | None = None

    def begin(self, module: MultiTaskModule) -> None:
        """Refuse, before the first step, an optimizer in which heads have no groups of their own."""
        self.groups, self.effective = GroupRates(), None
        if (rates := module.task_rates()) is not None:
            self.groups.check(module, module.single_optimizer().optimizer, shares_trunk=rates.shares_trunk)

    def shares(self, module: MultiTaskModule, step: int) -> Tensor | None:
        """What multiplies the tasks' weights in the shared gradient of a step, ``[K]``; None for 1."""
        rates = module.task_rates()
        if rates is None or not rates.shares_trunk:
            return None
        return rates.current(step).to(module.device, torch.float32)

    def collect(
        self, module: MultiTaskModule, window: Window, batch: object, outputs: Mapping[str, TaskOutput]
    ) -> None:
        """Keep what is asked for of a micro-batch's targets and predictions."""
        rates = module.task_rates()
        if rates is None or not rates.collects:
            return
        if is_per_task(batch, module.tasks):
            raise ValueError(
                "The relatedness of tasks is measured on targets of the same samples, and each task has samples of its "
                "own where a batch is {task: (inputs, target)}; measure Relatedness('gradient_cosine')."
            )
        for what, limit in rates.collects.items():
            newest = aligned(outputs, tuple(module.tasks), what, limit, module.device)
            window.samples.setdefault(what, []).append(newest)

    def choose(self, module: MultiTaskModule, window: Window) -> None:
        """Decide what the step that ends this window multiplies."""
        rates, self.effective = module.task_rates(), None
        if rates is not None:
            multipliers = rates.current(window.step).tolist()
            self.effective = self.groups.choose(module, module.single_optimizer().optimizer, multipliers)

    @contextmanager
    def around_step(self, module: MultiTaskModule, *, finite: bool) -> Iterator[None]:
        """Scale the learning rates of the step inside, where the module takes it."""
        if module.task_rates() is None:
            yield
            return
        optimizer = module.single_optimizer().optimizer
        if finite:
            self.before_step(module, optimizer, module.gradient_scale)
        with self.groups.putting_back(optimizer):
            self.groups.apply(optimizer)
            yield

    def before_step(
        self, module: MultiTaskModule, optimizer: torch.optim.Optimizer, scale: Tensor | None = None
    ) -> None:
        """Show the heads' gradients, finite ones, before they are clipped."""
        rates = module.task_rates()
        if rates is not None and rates.reads_heads:
            rates.observe_heads(self.groups.gradient_norms(module, optimizer, scale))

    def observe(self, module: MultiTaskModule, window: Window, signals: Signals) -> None:
        """Show what else the step has measured."""
        if (rates := module.task_rates()) is None:
            return
        rates.observe(signals, window.positions(signals.tasks))
        for what, values in window.samples.items():
            rates.observe_samples(what, of_all_ranks(values, window.ranks))
