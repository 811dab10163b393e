"""What the training step asks of a module, beside the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchmetrics import MetricCollection

from lightning_mtl.learning_rates.parameter_groups import Depth
from lightning_mtl.learning_rates.task_learning_rate import TaskLearningRate
from lightning_mtl.method.base import Weighting, weighting_of
from lightning_mtl.task import Task, TaskOutput
from lightning_mtl.task.batches import present_outputs, without_others
from lightning_mtl.task.labels import MaskedTarget, labelled_part, number_of_samples
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.step import Optimization


class SteppedModule(pl.LightningModule):
    """The side of a multi-task module that its training step sees; users meet ``MultiTaskModule`` alone."""

    trunk: nn.Module
    tasks: dict[str, Task]
    accumulate_grad_batches: int
    optimization: Optimization
    recorder: Recorder
    learned_tasks: frozenset[str] | None = None
    """The tasks that train; the others count as absent from every batch. None stands for all."""
    depths: tuple[Depth, ...] = ()
    """Parts of the model with learning rates of their own, as a callback that unfreezes them gives them."""

    def task_losses(self, batch: Any) -> Mapping[str, Tensor | TaskOutput]:  # noqa: ANN401
        """Compute the loss of each task that the batch has labels for."""
        raise TypeError(f"{type(self).__name__} has no task_losses.")

    @property
    def micro_batches_a_step(self) -> int:
        """How many micro-batches an optimizer step takes, whoever accumulates them."""
        return self.trainer.accumulate_grad_batches if self.automatic_optimization else self.accumulate_grad_batches

    @property
    def opens_window(self) -> bool:
        """Whether the next micro-batch begins an optimizer step."""
        return self.optimization.window is None

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over the ranks (FSDP2)."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def data_parallel_group(self) -> ProcessGroup | None:
        """The processes with different data; None is all of them."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return None
        return strategy.device_mesh["data_parallel"].get_group()

    def weighting(self) -> Weighting | None:
        """The Trainer's weighting; None where there is none, as while a tuner has replaced the callbacks."""
        return weighting_of(self.trainer)

    def task_rates(self) -> TaskLearningRate | None:
        """The Trainer's callback for learning rates of the tasks' own, if there is one."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, TaskLearningRate)), None)

    @property
    def gradient_scale(self) -> Tensor | None:
        """A gradient scaler's factor, which gradients have until the optimizer's step; None where nothing scales."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return None
        factor: Tensor = scaler.scale(torch.ones((), device=self.device))
        return factor

    def trainable_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The shared parameters that need gradients now, and all other parameters that do."""
        shared: list[Tensor] = [p for p in self.shared_parameters() if p.requires_grad]
        known = set(shared)
        return shared, [p for p in self.parameters() if p.requires_grad and p not in known]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that tasks share."""
        raise TypeError(f"{type(self).__name__} has no shared_parameters.")

    def single_optimizer(self) -> LightningOptimizer:
        """The one optimizer."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # noqa: S101 - for mypy: several were refused at setup
        return optimizer

    def task_output(self, task: str, prediction: Any, target: Any) -> TaskOutput:  # noqa: ANN401 - any pytree
        """Compute a task's loss on what is labelled, for a ``task_losses`` of one's own; see ``Task(missing=...)``.

        Without a label in the batch the task counts as absent from it, and its loss is not called.

        Raises:
            TypeError: If the target is of no form that labels can be looked for in, see
                :func:`~lightning_mtl.task.labels.labelled_part`.
            ValueError: If prediction and target do not have the form of the mask.
        """
        declared = self.tasks[task]
        partial = declared.missing is not None or isinstance(target, MaskedTarget)
        part = labelled_part(prediction, target, declared.missing, declared.missing_per)
        if self.recorder.labels.counts_now:
            self.recorder.labels.add(
                task, part.num_samples, part.num_missing, number_of_samples(target), looked=partial
            )
        if not partial:
            return TaskOutput(declared.loss(prediction, target), prediction, target)
        loss = declared.loss(part.prediction, part.target) if part.num_samples else torch.zeros(())
        return TaskOutput(loss, part.prediction, part.target, part.num_samples)

    def present_outputs(self, batch: Any) -> dict[str, TaskOutput]:  # noqa: ANN401
        """The checked outputs of the tasks that a batch has labels for, in order."""
        learned = self.learned_tasks
        if learned is None:
            return present_outputs(self.task_losses(batch), list(self.tasks))
        outputs = present_outputs(self.task_losses(without_others(batch, self.tasks, learned)), list(self.tasks))
        return {task: output for task, output in outputs.items() if task in learned}

    def stage_metrics(self, stage: str) -> dict[str, MetricCollection]:
        """The metrics of each task that has some, for ``"train"``, ``"val"`` or ``"test"``."""
        return dict(getattr(self, f"{stage}_metrics").items())

    def update_metrics(
        self, stage: str, outputs: Mapping[str, TaskOutput], step_metric: str | None = None
    ) -> dict[str, Tensor] | None:
        """Count a batch into the stage's metrics; return each task's own value of ``step_metric`` on it, if asked."""
        collections = self.stage_metrics(stage)
        scores: dict[str, Tensor] | None = None if step_metric is None else {}
        for task, output in outputs.items():
            if task not in collections or output.prediction is None or output.target is None:
                continue
            prediction = apply_to_collection(output.prediction, Tensor, Tensor.detach)
            if scores is None:
                collections[task].update(prediction, output.target)
            else:
                scores[task] = collections[task](prediction, output.target)[step_metric].detach()
        return scores
