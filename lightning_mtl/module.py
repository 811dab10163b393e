"""MultiTaskModule is the LightningModule that holds a shared trunk and one head a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn

from lightning_mtl.task.batches import (
    as_pair,
    call_trunk_with,
    inputs_alone,
    is_joint,
    is_per_task,
    present_outputs,
    refuse_batch,
    without_others,
)
from lightning_mtl.task.concatenation import concatenate, rows_of
from lightning_mtl.task.labels import MaskedTarget, labeled_part, number_of_samples
from lightning_mtl.task.task import Task, TaskOutput, name_task
from lightning_mtl.task.units import Standardizers, Units
from lightning_mtl.training.checks import check_arguments, check_inputs_differ
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.module import SteppedModule
from lightning_mtl.training.schedulers import LRSchedulerCallable, OptimizerCallable
from lightning_mtl.training.step import Optimization
from lightning_mtl.trunk import TrunkParts


class MultiTaskModule(SteppedModule):
    r"""A LightningModule with a shared trunk, one head a task, and the tasks balanced by a callback.

    .. math:: z = \mathrm{trunk}(x), \qquad \hat y_k = \mathrm{head}_k(z), \qquad \min_\theta \sum_k w_k L_k

    The weights :math:`w_k` come from the :class:`~lightning_mtl.Weighting` among the Trainer's callbacks; without one
    all are 1. It is used as it is, or subclassed: :meth:`task_losses` is the one method usually overridden.

    Lightning's hooks of modules and callbacks are called as in automatic optimization, which ``automatic_optimization =
    True`` chooses. Each ``fit`` begins with a method, an optimizer and a count of skipped steps of its own, unless
    ``ckpt_path`` restores them; steps and epochs are the Trainer's and go on where it fits again.

    Args:
        trunk: The shared part. It takes the batch's inputs: a tensor, a tuple or list as positional arguments, a dict
            as keyword arguments; a named tuple, or a list where it has one parameter, as one argument. It returns a
            tensor or any nested structure, given to every head; a dict with an entry for every task gives each its own.
        heads: ``{task: module}``, each called with the trunk's output.
        tasks: ``{task: Task}`` with the same names.
        accumulate_grad_batches: Micro-batches an optimizer step; what the Trainer's argument of this name does in
            automatic optimization.
        gradient_clip_val: Clip gradients to this norm, or value, before each optimizer step.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        concatenate_inputs: Where each task has inputs of its own, call the trunk once on all of them behind each other
            instead of once a task. The numbers are the same but for what mixes samples (BatchNorm, whose statistics
            are then over all tasks) or draws at random (dropout). It is faster where losses alone are weighed and
            batches are small, and slower at the trunk, where each task is passed back through all tasks' samples.
        max_skipped_steps: A step with a loss or gradient that is not finite is skipped; more of them in a row than this
            end the training with an error.
        optimizer: Called with the parameters, returns the optimizer; unused where ``configure_optimizers`` is
            overridden.
        lr_scheduler: Called with the optimizer, returns a scheduler stepped once an epoch. For another interval, or a
            monitored metric, override ``configure_optimizers`` and return Lightning's usual dictionary.
        trunk_lr: The trunk's learning rate, where it is not the optimizer's. A scheduler that sets one rate for all
            parts is refused with the list that keeps them: ``OneCycleLR(max_lr=[...])``.
        head_lr: ``{task: learning rate}`` of heads, likewise.

    Raises:
        ValueError: If the names of heads and tasks differ or cannot name a module, or a number is out of its range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from torch.nn.functional import cross_entropy, l1_loss
        >>> model = MultiTaskModule(
        ...     trunk=nn.Sequential(nn.Linear(64, 128), nn.ReLU()),
        ...     heads={"age": nn.Linear(128, 1), "smile": nn.Linear(128, 2)},
        ...     tasks={"age": Task(loss=l1_loss), "smile": Task(loss=cross_entropy)},
        ... )
        >>> {task: list(prediction.shape) for task, prediction in model(torch.zeros(3, 64)).items()}
        {'age': [3, 1], 'smile': [3, 2]}
    """

    heads: nn.ModuleDict

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        tasks: Mapping[str, Task],
        *,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        concatenate_inputs: bool = False,
        max_skipped_steps: int = 100,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        trunk_lr: float | None = None,
        head_lr: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(trunk, heads, tasks, accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: heads[task] for task in tasks})
        self.tasks = dict(tasks)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.concatenate_inputs, self.max_skipped_steps = concatenate_inputs, max_skipped_steps
        self.target_units = Standardizers({k: task.standardize for k, task in tasks.items()}, heads)
        self.recorder = Recorder(self.tasks)
        self.schedules: list[LRSchedulerConfig] = []
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self._trunk_lr, self._head_lr = trunk_lr, dict(head_lr or {})
        self.optimization = Optimization(self.recorder)
        # A loss with buffers or parameters of its own moves with the module and is saved with it.
        losses = {k: task.loss for k, task in tasks.items() if isinstance(task.loss, nn.Module)}
        self.loss_modules = nn.ModuleDict(losses)
        for stage in ("train", "val", "test"):
            metrics = {k: task.metric_collection() for k, task in tasks.items() if task.metrics is not None}
            setattr(self, f"{stage}_metrics", nn.ModuleDict(metrics))

    # The model

    @property
    def trunk_parts(self) -> TrunkParts:
        """What the trunk and its parts say of themselves; looked for once, and again in each fit or evaluation."""
        if self._trunk_parts is None or self._trunk_parts.trunk is not self.trunk:
            self._trunk_parts = TrunkParts(self.trunk, self.tasks)
        return self._trunk_parts

    def forward(self, inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401 - whatever the trunk takes
        """Predict every task: ``{task: head(trunk(inputs))}``."""
        return self._predict(inputs, self.tasks)

    def _predict(self, inputs: Any, tasks: Iterable[str], rows: Mapping[str, slice] | None = None) -> dict[str, Tensor]:  # noqa: ANN401
        wanted = list(tasks)
        parts = self.trunk_parts
        features = call_trunk(parts, inputs, wanted)
        split = isinstance(features, Mapping) and features.keys() >= (
            set(wanted) if parts.per_task else self.heads.keys()
        )
        predictions = {}
        for task in wanted:
            own = features[task] if split else features
            own = own if rows is None else rows_of(task, rows, own)
            try:
                predictions[task] = self.heads[task](own)
            except Exception as error:
                name_task(error, "head", task)
                raise
        return predictions

    def _predict_each(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Predict every task from inputs of its own."""
        overridden = type(self).forward is not MultiTaskModule.forward
        if self.concatenate_inputs and len(inputs) > 1:
            whole, rows = concatenate(inputs)
            if overridden:
                predictions = self(whole)
                return {task: rows_of(task, rows, predictions[task]) for task in inputs}
            return self._predict(whole, inputs, rows)
        if overridden:
            return {task: self(own)[task] for task, own in inputs.items()}
        return {task: self._predict(own, [task])[task] for task, own in inputs.items()}

    def task_losses(self, batch: Any) -> Mapping[str, Tensor | TaskOutput]:  # noqa: ANN401 - whatever the loader yields
        """Compute the loss of each task that the batch has labels for; override it for batches of another form.

        Call ``self(inputs)``, or ``self.trunk`` and ``self.heads``, and return ``{task: loss}``, each loss a scalar
        tensor, or a :class:`~lightning_mtl.TaskOutput` to have metrics and exact means, too: what
        ``self.task_output(task, prediction, target)`` makes. A task without a label in the batch is left out.

        Args:
            batch: ``(inputs, {task: target})``, or ``{task: (inputs, target)}`` when tasks have loaders of their own;
                a target or an entry of None stands for no label. Where some samples of a batch are labeled, see
                ``Task(missing=...)`` and :class:`~lightning_mtl.MaskedTarget`. A batch with all of the module's tasks
                may have others, too, so that a model of one task trains on the same loader.

        Raises:
            ValueError: If the batch has another form.
        """
        if is_joint(batch, self.tasks):
            inputs, targets = batch
            predictions = self(inputs)
            found = {task: target for task, target in targets.items() if task in self.tasks and target is not None}
            if len(found) < len(self.tasks):
                self.recorder.labels.add_unlabeled(self.tasks.keys() - found.keys(), number_of_samples(inputs))
            return {task: self.task_output(task, predictions[task], target) for task, target in found.items()}
        if not is_per_task(batch, self.tasks):
            raise refuse_batch(batch, self.tasks)
        pairs = {task: pair for task, pair in batch.items() if task in self.tasks and pair is not None}
        if len(pairs) > 1:
            check_inputs_differ(self)
        predictions = self._predict_each({task: pair[0] for task, pair in pairs.items()})
        return {task: self.task_output(task, predictions[task], pair[1]) for task, pair in pairs.items()}

    def task_output(self, task: str, prediction: Any, target: Any) -> TaskOutput:  # noqa: ANN401 - any pytree
        """Compute a task's loss on what is labeled, for a ``task_losses`` of one's own; see ``Task(missing=...)``.

        Without a label in the batch the task counts as absent from it, and its loss is not called.

        Raises:
            TypeError: If the target is of no form that labels can be looked for in, see
                :func:`~lightning_mtl.task.labels.labeled_part`.
            ValueError: If prediction and target do not fit the mask, or the loss would broadcast them to all pairs.
        """
        declared, num_samples = self.tasks[task], None
        units = cast("Units", self.target_units[task]) if task in self.target_units else None
        try:
            spread = None if units is None else units.spread(prediction, target)
            if declared.missing is not None or isinstance(target, MaskedTarget):
                given = prediction if spread is None else (prediction, spread)
                part = labeled_part(given, target, declared.missing, declared.missing_per, declared.class_dim)
                self.recorder.labels.add(task, part.num_samples, part.num_missing, number_of_samples(target))
                prediction, target, num_samples = part[:3]
                if spread is not None:
                    prediction, spread = prediction
            if num_samples == 0:
                return TaskOutput(torch.zeros(()), prediction, target, 0)
            if (task, self.training) not in self.recorder.shapes:
                self.recorder.shapes.check(task, self.training, declared.loss, prediction, target)
            if spread is None:
                return TaskOutput(declared.loss(prediction, target), prediction, target, num_samples)
            mean, std = spread
            loss = declared.loss((prediction - mean) / std, (target - mean) / std)
            return TaskOutput(loss, prediction, target, num_samples)
        except Exception as error:
            name_task(error, "loss", task)
            raise

    def present_outputs(self, batch: Any, without: Set[str] = frozenset()) -> dict[str, TaskOutput]:  # noqa: ANN401
        """The checked outputs of the tasks that a batch has labels for, in order; none of tasks ``without``."""
        learned = self.learned_tasks
        if without:
            learned = frozenset(self.tasks if learned is None else learned) - without
        if learned is None:
            return present_outputs(self.task_losses(batch), list(self.tasks), self.device)
        found = self.task_losses(without_others(batch, self.tasks, learned))
        outputs = present_outputs(found, list(self.tasks), self.device)
        return {task: output for task, output in outputs.items() if task in learned}

    def penalties(self) -> dict[str, Tensor]:
        """Scalars added to the objective with weight 1, logged as ``penalty/<name>``; they are no tasks to balance.

        By default those of the trunk and its parts, where these have a method ``penalties()`` of their own; an override
        adds to them: ``{**super().penalties(), "name": value}``.
        """
        parts = self.trunk_parts
        return parts.penalties(self.present_tasks) if parts.penalized else {}

    def penalties_with(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The penalties in a step in which some rank has ``tasks``: what only others use is left where it is."""
        self.present_tasks = tasks
        try:
            return self.penalties()
        finally:
            self.present_tasks = None

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that tasks share, whose gradients the methods balance.

        By default all of the trunk's, but for what it, or a part inside it, leaves out of its own
        ``shared_parameters()``.
        """
        parts = self.trunk_parts
        return parts.shared_parameters() if parts.divided else list(self.trunk.parameters())

    def trainable_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The shared parameters that need gradients now, and all other parameters that do."""
        shared: list[Tensor] = [p for p in self.shared_parameters() if p.requires_grad]
        known = set(shared)
        return shared, [p for p in self.parameters() if p.requires_grad and p not in known]

    # Lightning's steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # noqa: ANN401
        """Measure, weigh, apply and log one micro-batch; return the loss whose gradient was applied."""
        return self.optimization.run(self, batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:  # noqa: ANN401
        """Predict every task of a batch of inputs, with or without targets; a task with a loader of its own, alone."""
        named = self.under_its_name("predict", batch, dataloader_idx)
        batch = batch if named is batch else {task: as_pair(own) for task, own in named.items()}
        if is_joint(batch, self.tasks):
            return self.forward(batch[0])
        if is_per_task(batch, self.tasks):
            pairs = {task: pair for task, pair in batch.items() if task in self.tasks and pair is not None}
            return self._predict_each({task: pair[0] for task, pair in pairs.items()})
        with inputs_alone(batch) as inputs:
            return self.forward(inputs)


def call_trunk(parts: TrunkParts, inputs: Any, tasks: Sequence[str]) -> Any:  # noqa: ANN401 - whatever the trunk takes
    """Compute what the trunk makes of a batch's inputs, for ``tasks`` alone if it, or a part inside it, can."""
    positional, named = ((inputs,), {}) if isinstance(inputs, Tensor) else call_trunk_with(inputs, parts.trunk)
    return parts.call(positional, named, tasks) if parts.per_task else parts.trunk(*positional, **named)
