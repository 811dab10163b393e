"""MultiTaskModule is the LightningModule that holds a shared trunk and one head a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.task.advice import on_head, on_trunk
from lightning_mtl.task.batches import (
    as_pair,
    call_trunk_with,
    inputs_alone,
    is_joint,
    is_per_task,
    refuse_batch,
)
from lightning_mtl.task.concatenation import concatenate, rows_of
from lightning_mtl.task.flat import FlatBatches
from lightning_mtl.task.labels import number_of_samples
from lightning_mtl.task.task import Task, TaskOutput, name_task
from lightning_mtl.task.units import Standardizers
from lightning_mtl.training.checks import check_arguments, check_inputs_differ
from lightning_mtl.training.loading import keep_configuration
from lightning_mtl.training.schedulers import LRSchedulerCallable, OptimizerCallable
from lightning_mtl.trunk import TrunkParts


class MultiTaskModule(BalancedModule):
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
        inputs: For flat batches, one dict with inputs and targets: the keys that the trunk takes as keyword arguments,
            or one key, as a plain text, that it takes by position. None takes all keys that are no targets.
        targets: ``{task: key}`` for flat batches; a task that is not named has its own name for a key. Either of the
            two makes every stage read flat batches, and ``{task: flat batch}``.
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

    trunk: nn.Module
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
        inputs: str | Sequence[str] | None = None,
        targets: Mapping[str, str] | None = None,
        concatenate_inputs: bool = False,
        max_skipped_steps: int = 100,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        trunk_lr: float | None = None,
        head_lr: Mapping[str, float] | None = None,
    ) -> None:
        check_arguments(trunk, heads, tasks)
        super().__init__(
            tasks,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            max_skipped_steps=max_skipped_steps,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.concatenate_inputs = concatenate_inputs
        self.flat_batches = FlatBatches.of(inputs, targets, tasks)
        self._trunk_lr, self._head_lr = trunk_lr, dict(head_lr or {})
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: heads[task] for task in tasks})
        keep_configuration(self)
        self._hold(Standardizers({k: task.standardize for k, task in tasks.items()}, heads))

    def _standardizers(self) -> Standardizers:
        return Standardizers({}, {})  # until the heads are known

    def in_known_form(self, batch: Any) -> Any:  # noqa: ANN401 - whatever the loader yields
        """Bring a flat batch into one of the two forms; an overridden ``task_losses`` gets it as the loader made it."""
        own = type(self).task_losses is MultiTaskModule.task_losses
        return self.flat_batches.read(batch, self.tasks) if own and self.flat_batches is not None else batch

    # The model

    @property
    def the_trunk(self) -> nn.Module:
        """The trunk."""
        return self.trunk

    @property
    def the_heads(self) -> dict[str, nn.Module]:
        """The heads."""
        return dict(self.heads.items())

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
                name_task(error, "head", task, on_head(self.heads[task], own))
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
        batch = batch if self.flat_batches is None else self.flat_batches.read(batch, self.tasks)
        if is_joint(batch, self.tasks):
            inputs, targets = batch
            predictions = self(inputs)
            found = {task: target for task, target in targets.items() if task in self.tasks and target is not None}
            if len(found) < len(self.tasks):
                self.recorder.labels.add_unlabeled(self.tasks.keys() - found.keys(), number_of_samples(inputs))
            return self.task_outputs(predictions, found)
        if not is_per_task(batch, self.tasks):
            raise refuse_batch(batch, self.tasks)
        pairs = {task: pair for task, pair in batch.items() if task in self.tasks and pair is not None}
        if len(pairs) > 1:
            check_inputs_differ(self)
        predictions = self._predict_each({task: pair[0] for task, pair in pairs.items()})
        return self.task_outputs(predictions, {task: pair[1] for task, pair in pairs.items()})

    def penalties(self) -> dict[str, Tensor]:
        """Scalars added to the objective with weight 1, logged as ``penalty/<name>``; they are no tasks to balance.

        By default those of the trunk and its parts, where these have a method ``penalties()`` of their own; an override
        adds to them: ``{**super().penalties(), "name": value}``.
        """
        parts = self.trunk_parts
        return parts.penalties(self.present_tasks) if parts.penalized else {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that tasks share, whose gradients the methods balance.

        By default all of the trunk's, but for what it, or a part inside it, leaves out of its own
        ``shared_parameters()``.
        """
        parts = self.trunk_parts
        return parts.shared_parameters() if parts.divided else list(self.trunk.parameters())

    # Lightning's steps

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:  # noqa: ANN401
        """Predict every task of a batch of inputs, with or without targets; a task with a loader of its own, alone."""
        named = self.under_its_name("predict", batch, dataloader_idx)
        batch = batch if named is batch else {task: as_pair(own) for task, own in named.items()}
        if self.flat_batches is not None:
            batch = self.flat_batches.read(batch, self.tasks, labeled=False)
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
    try:
        return parts.call(positional, named, tasks) if parts.per_task else parts.trunk(*positional, **named)
    except TypeError as error:
        if parts.per_task or (said := on_trunk(parts.trunk, positional, named)) is None:
            raise
        raise TypeError(said) from error


def check_parts(module: object, what: str) -> None:
    """Refuse a module without a trunk and heads where something works on them.

    Raises:
        TypeError: Then.
    """
    if not isinstance(module, MultiTaskModule):
        raise TypeError(
            f"{what} works on a trunk and heads, which {type(module).__name__} has not; make it a MultiTaskModule."
        )
