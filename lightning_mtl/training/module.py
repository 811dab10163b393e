"""Lightning calls these hooks of a module with tasks, and they lead to the training step and to a stage's means."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from typing_extensions import Self

from lightning_mtl.gradients.micro_batch import stack_losses
from lightning_mtl.learning_rates.parameter_groups import Rate, apply_lr_factors, parameter_groups
from lightning_mtl.learning_rates.task_learning_rate import task_rates_of
from lightning_mtl.method.base import Weighting, weighting_of
from lightning_mtl.monitors.fit_table import bring_fit_table
from lightning_mtl.monitors.model_summary import show_heads
from lightning_mtl.task.batches import LossModule, is_per_task, under_its_name
from lightning_mtl.training.arguments import refuse_callbacks
from lightning_mtl.training.checks import check_trainer_arguments, several_loaders
from lightning_mtl.training.evaluation import evaluating
from lightning_mtl.training.hooks import AutomaticStepHooks, StepHooks
from lightning_mtl.training.loading import missing_arguments
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.losses import sample_counts
from lightning_mtl.training.resume import Resume
from lightning_mtl.training.schedulers import (
    LRSchedulerCallable,
    OptimizerCallable,
    keeping_schedules,
)
from lightning_mtl.training.scores import update_metrics
from lightning_mtl.training.step import Optimization
from lightning_mtl.training.update import WRAPPERS, OptimizerHooks
from lightning_mtl.training.wrapping import Hook, wrap_own


def with_own_callbacks(configure: Hook) -> Hook:
    """Let ``configure_callbacks`` also bring the recorder, the step's hooks and the final table along, once."""

    @functools.wraps(configure)
    def configure_callbacks(self: SteppedModule) -> list[pl.Callback]:
        # As LightningCLI sets configure_optimizers for --optimizer, past what the class is wrapped with.
        for name, wrap in {"configure_optimizers": keeping_schedules, **WRAPPERS}.items():
            wrap_own(self, name, wrap)
        if self._trainer is not None:
            check_trainer_arguments(self, self.trainer)
        for name, kind in (("recorder", Recorder), ("optimization", Optimization)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{type(self).__name__}.{name} is the base class's own; give yours another name.")
        brought = configure(self)
        callbacks = [brought] if isinstance(brought, pl.Callback) else list(brought)
        if self.recorder in callbacks:  # a call of super()
            return callbacks
        hooks = AutomaticStepHooks if self.automatic_optimization else StepHooks
        # From an earlier run the Trainer may have them already; Lightning would warn that they replace themselves.
        there: list[pl.Callback] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        if self.recorder in there and any(type(callback) is hooks for callback in there):
            return callbacks
        shown: list[pl.Callback] = []
        if self._trainer is not None:
            show_heads(self.trainer)
            shown += bring_fit_table(self.trainer)
        return [*callbacks, self.recorder, hooks(self.optimization), Resume(self.optimization), *shown]

    return cast("Hook", configure_callbacks)


class SteppedModule(LossModule, OptimizerHooks):
    """The hooks of :class:`~lightning_mtl.BalancedModule`.

    Attributes:
        recorder: What is logged.
        optimization: What takes the steps.
    """

    recorder: Recorder
    optimization: Optimization
    _make_optimizer: OptimizerCallable
    _make_scheduler: LRSchedulerCallable | None
    _trunk_lr: float | None
    _head_lr: dict[str, float]

    def __init__(self) -> None:
        # Lightning forgets what a subclass has set before its super().__init__(), or as an attribute of the class.
        automatic = getattr(self, "automatic_optimization", False)
        super().__init__()
        self.automatic_optimization = automatic

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        # Lightning drops what schedulers follow in manual optimization, and a hook that a subclass overrides without
        # calling super() would lose the logging: both are put back around whatever the subclass defines.
        cls.configure_optimizers = keeping_schedules(cls.configure_optimizers)  # type: ignore[method-assign]
        cls.configure_callbacks = with_own_callbacks(cls.configure_callbacks)  # type: ignore[method-assign]

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

    def __new__(cls, *arguments: Any, **named: Any) -> Self:  # noqa: ANN401 - a subclass's
        """Refuse a weighting, or another callback, that was meant for the Trainer."""
        refuse_callbacks(cls, arguments, named)
        return super().__new__(cls)

    @classmethod
    def load_from_checkpoint(cls, *arguments: Any, **named: Any) -> Self:  # noqa: ANN401
        """Load a module as Lightning does; name the arguments that a checkpoint lacks.

        Raises:
            TypeError: If the constructor has arguments that neither the checkpoint nor the call has.
        """
        try:
            return super().load_from_checkpoint(*arguments, **named)
        except TypeError as error:
            if (said := missing_arguments(cls, named, error)) is not None:
                raise said from error
            raise

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

    # Of a module that is compiled whole, what it computes is compiled, and not this bookkeeping.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it returns
    def _evaluate(self, stage: str, batch: Any, dataloader_idx: int) -> None:  # noqa: ANN401
        named = self.in_known_form(self.under_its_name(stage, batch, dataloader_idx))
        # A module without a trunk reads what comes under a name by itself.
        known = is_per_task(named, self.tasks) or (self.the_trunk is None and named is not batch)
        if dataloader_idx > 0 and not known:
            raise several_loaders()
        with evaluating(self, named) as given:
            outputs = self.present_outputs(given)
        if not outputs:
            return
        update_metrics(self, stage, outputs)
        losses = stack_losses([output.loss.detach() for output in outputs.values()], self.device)
        self.recorder.losses[stage].add(losses, sample_counts(list(outputs.values())), list(outputs))

    @property
    def gives_rates(self) -> bool:
        """Whether the trunk, or a head, was given a learning rate of its own."""
        return self._trunk_lr is not None or bool(self._head_lr)

    @keeping_schedules
    def configure_optimizers(self) -> Any:  # noqa: ANN401 - any of the forms that Lightning takes
        """Build what the arguments say, of :meth:`parameter_groups` where parts have own rates; overridable."""
        grouped = self.gives_rates or bool(self.depths)
        grouped = grouped or (self._trainer is not None and task_rates_of(self.trainer) is not None)
        groups = self.parameter_groups(trunk_lr=self._trunk_lr, head_lr=self._head_lr) if grouped else self.parameters()
        optimizer = self._make_optimizer(groups)
        apply_lr_factors(optimizer)
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        followed = {"scheduler": scheduler, "monitor": getattr(scheduler, "monitor", None)}
        return {"optimizer": optimizer, "lr_scheduler": followed}

    def parameter_groups(
        self,
        lr: Rate | None = None,
        *,
        trunk_lr: Rate | None = None,
        head_lr: Mapping[str, Rate] | None = None,
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Give an optimizer one named group for each part: ``"trunk"``, ``"head/<task>"``, and ``"rest"``.

        Each parameter is in one group. What several heads share, and what belongs to neither trunk nor heads, such as
        a loss's parameters, is the rest's; what the trunk shares with a head is the trunk's. Where a callback gives
        parts of the trunk learning rates of their own, these have groups: ``"trunk/<part>"``.

        Args:
            lr: The learning rate of all groups; None leaves it to the optimizer.
            trunk_lr: The trunk's, instead.
            head_lr: ``{task: learning rate}`` of single heads, instead.
            weight_decay: The weight decay of all groups; None leaves it to the optimizer.

        Raises:
            ValueError: If a number is negative or not finite, or ``head_lr`` names an unknown task.

        Example:
            ``return torch.optim.Adam(self.parameter_groups(1e-3, head_lr={"age": 1e-4}))`` in configure_optimizers.
        """
        return parameter_groups(self, lr, trunk_lr=trunk_lr, head_lr=head_lr or {}, weight_decay=weight_decay)

    @with_own_callbacks
    def configure_callbacks(self) -> list[pl.Callback]:
        """Bring the callbacks along that log and begin; a subclass that overrides this need not call ``super()``."""
        return []

    def on_validation_model_zero_grad(self) -> None:
        """Keep accumulated gradients over a validation in the middle of a window."""
        if self.opens_window:
            super().on_validation_model_zero_grad()
