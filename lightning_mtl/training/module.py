"""Lightning calls these hooks of a module with tasks, and they lead to the training step and to a stage's means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from lightning_mtl.method.base import Weighting, weighting_of
from lightning_mtl.task.batches import is_per_task, under_its_name
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.hooks import AutomaticStepHooks, StepHooks
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.losses import sample_counts
from lightning_mtl.training.resume import Resume
from lightning_mtl.training.schedulers import Hook, keep_schedules_of_instance, keeping_schedules
from lightning_mtl.training.step import Optimization


def putting_rates_back(step: Hook) -> Hook:
    """Let ``optimizer_step`` of automatic optimization leave the learning rates as it found them."""

    @functools.wraps(step)
    def optimizer_step(
        self: SteppedModule,
        epoch: int,
        batch_idx: int,
        optimizer: LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the hook returns
        steering = self.optimization.find_cast(self).steering
        if steering is None:
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)
        with steering.groups.putting_back(optimizer.optimizer):
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)

    return cast("Hook", optimizer_step)


def with_own_callbacks(configure: Hook) -> Hook:
    """Let ``configure_callbacks`` also bring the recorder and the step's hooks along, once."""

    @functools.wraps(configure)
    def configure_callbacks(self: SteppedModule) -> list[pl.Callback]:
        keep_schedules_of_instance(self)
        brought = configure(self)
        callbacks = [brought] if isinstance(brought, pl.Callback) else list(brought)
        if self.recorder in callbacks:  # a call of super()
            return callbacks
        hooks = AutomaticStepHooks if self.automatic_optimization else StepHooks
        return [*callbacks, self.recorder, hooks(self.optimization), Resume(self.optimization)]

    return cast("Hook", configure_callbacks)


class SteppedModule(TaskModule):
    """The hooks of :class:`~lightning_mtl.MultiTaskModule`.

    Attributes:
        recorder: What is logged.
        optimization: What takes the steps.
    """

    recorder: Recorder
    optimization: Optimization

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        # Lightning drops what schedulers follow in manual optimization, and a hook that a subclass overrides without
        # calling super() would lose the logging: both are put back around whatever the subclass defines.
        cls.configure_optimizers = keeping_schedules(cls.configure_optimizers)  # type: ignore[method-assign]
        cls.configure_callbacks = with_own_callbacks(cls.configure_callbacks)  # type: ignore[method-assign]
        if "optimizer_step" in cls.__dict__:
            cls.optimizer_step = putting_rates_back(cls.optimizer_step)

    @property
    def opens_window(self) -> bool:
        """Whether the next micro-batch begins an optimizer step."""
        return self.optimization.window is None

    @property
    def stage_scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """For each stage, what its last epoch gave each task that had samples."""
        return self.recorder.scores

    def weighting(self) -> Weighting | None:
        """The Trainer's weighting; None where there is none, as while a tuner has replaced the callbacks."""
        return weighting_of(self.trainer)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Count the batch into ``val/loss/<task>`` and ``val/<metric>/<task>``."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Count the batch into ``test/loss/<task>`` and ``test/<metric>/<task>``."""
        self._evaluate("test", batch, dataloader_idx)

    def under_its_name(self, stage: str, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Give a batch of one of several loaders, named by tasks, its name back."""
        loaders = None if self._trainer is None else getattr(self.trainer, f"{stage}_dataloaders")
        return under_its_name(batch, loaders, dataloader_idx, self.tasks)

    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:  # noqa: ANN401
        batch = self.under_its_name(stage, batch, dataloader_idx)
        if dataloader_idx > 0 and not is_per_task(batch, self.tasks):
            raise ValueError(
                "Several evaluation loaders would be averaged into one figure. Give each task its loader, as {task: "
                'loader, ...}, in a MultiTaskDataModule or a CombinedLoader({task: loader, ...}, "max_size"), or '
                "evaluate the loaders one at a time."
            )
        outputs = self.present_outputs(batch)
        if not outputs:
            return
        self.recorder.update_metrics(self, stage, outputs)
        losses = torch.stack([output.loss.detach() for output in outputs.values()])
        self.recorder.losses[stage].add(losses, sample_counts(list(outputs.values())), list(outputs))

    optimizer_step = putting_rates_back(pl.LightningModule.optimizer_step)

    @with_own_callbacks
    def configure_callbacks(self) -> list[pl.Callback]:
        """Bring the callbacks along that log and begin; a subclass that overrides this need not call ``super()``."""
        return []

    def on_validation_model_zero_grad(self) -> None:
        """Keep accumulated gradients over a validation in the middle of a window."""
        if self.opens_window:
            super().on_validation_model_zero_grad()
