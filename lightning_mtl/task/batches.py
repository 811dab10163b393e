"""A batch may have one of two forms, and task_losses has to return one; they are read, made and refused here."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mtl.task.advice import on_loss
from lightning_mtl.task.labels import MaskedTarget, labeled_part, number_of_samples
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.task import TaskOutput, name_task
from lightning_mtl.task.units import Units


def call_trunk_with(inputs: Any, trunk: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """Turn a batch's inputs into call arguments: a mapping becomes keywords, a tuple or list becomes positions.

    A named tuple, as a packed sequence is one, is one argument; so is a list where the trunk takes one argument alone,
    such as images of several sizes.

    Example:
        >>> call_trunk_with({"ids": 1})
        ((), {'ids': 1})
        >>> call_trunk_with((1, 2))
        ((1, 2), {})
        >>> call_trunk_with([1, 2], nn.Linear(1, 1))
        (([1, 2],), {})
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, tuple | list) or hasattr(inputs, "_fields"):
        return (inputs,), {}
    if isinstance(inputs, list) and trunk is not None and _takes_one(trunk):
        return (inputs,), {}
    return tuple(inputs), {}


def _takes_one(trunk: nn.Module) -> bool:
    """Whether a module's ``forward`` takes a single positional argument, beside the tasks that are asked for."""
    parameters = inspect.signature(trunk.forward).parameters.values()
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "tasks"]
    return len(by_place) == 1 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def is_joint(batch: Any, tasks: Collection[str]) -> bool:  # noqa: ANN401 - anything a loader may yield
    """Whether a batch is ``(inputs, {task: target})``."""
    return (
        isinstance(batch, tuple | list)
        and len(batch) == 2
        and isinstance(batch[1], Mapping)
        and _names_fit(batch[1], tasks)
    )


def _names_fit(entries: Mapping[Any, Any], tasks: Collection[str]) -> bool:
    """Whether a batch names tasks of the module alone, or all of them and others, which a smaller model leaves."""
    names = set(tasks)
    return entries.keys() <= names or entries.keys() >= names


def is_per_task(batch: Any, tasks: Collection[str]) -> bool:  # noqa: ANN401
    """Whether a batch is ``{task: (inputs, target)}``; None stands for a task without a batch."""
    return (
        isinstance(batch, Mapping)
        and len(batch) > 0
        and _names_fit(batch, tasks)
        and all(value is None or (isinstance(value, tuple | list) and len(value) == 2) for value in batch.values())
    )


def without_others(batch: Any, tasks: Collection[str], learned: Collection[str]) -> Any:  # noqa: ANN401
    """Take the inputs of tasks that do not train out of a batch that has some for each task; None takes their place.

    A trunk with batch normalization would otherwise learn from them. Inputs that all tasks share stay as they are.
    """
    if is_joint(batch, tasks) or not is_per_task(batch, tasks):
        return batch
    return {task: pair if task in learned else None for task, pair in batch.items()}


def under_its_name(batch: Any, loaders: Any, dataloader_idx: int, tasks: Collection[str]) -> Any:  # noqa: ANN401
    """Give a batch of one of ``{task: loader}``, which Lightning hands over without a name, its name back.

    Example:
        >>> under_its_name(("x", "y"), {"a": "its loader", "b": "its loader"}, 1, ["a", "b", "c"])
        {'b': ('x', 'y')}
        >>> under_its_name(("x", "y"), "one loader", 0, ["a", "b"])
        ('x', 'y')
    """
    if not isinstance(loaders, Mapping) or not set(loaders) <= set(tasks):
        return batch
    if (
        is_joint(batch, tasks)
        or is_per_task(batch, tasks)
        or (isinstance(batch, Mapping) and set(batch) == set(loaders))
    ):
        return batch  # one of all loaders at once, or of tasks anyway
    return {list(loaders)[dataloader_idx]: batch}


def as_pair(batch: Any) -> Any:  # noqa: ANN401 - whatever the dataset yields, collated
    """Inputs alone, as one predicts from, in the form ``(inputs, target)`` of a batch.

    Example:
        >>> as_pair("inputs"), as_pair(("inputs",)), as_pair(("inputs", "target"))
        (('inputs', None), ('inputs', None), ('inputs', 'target'))
    """
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return (*batch, None)[:2]
    return batch, None


@contextmanager
def inputs_alone(batch: Any) -> Iterator[Any]:  # noqa: ANN401
    """Take a batch as inputs to predict from: as it is, or what it alone holds, as ``TensorDataset(inputs)`` makes it.

    Raises:
        TypeError: If what is called with them inside the block cannot take them.

    Example:
        >>> with inputs_alone(["inputs"]) as inputs:
        ...     inputs
        'inputs'
    """
    single = isinstance(batch, tuple | list) and len(batch) == 1 and not hasattr(batch, "_fields")
    try:
        yield batch[0] if single else batch
    except TypeError as error:
        raise TypeError(
            f"The trunk cannot be called with {_form(batch)} to predict from; yield inputs alone, or (inputs, "
            "{task: target}), or override predict_step(batch, batch_idx) to read the batch as your task_losses does."
        ) from error


def refuse_batch(batch: Any, tasks: Collection[str]) -> ValueError:  # noqa: ANN401
    """The error for a batch of any other form."""
    return ValueError(
        f"A batch must be (inputs, {{task: target}}) or {{task: (inputs, target)}} with tasks among {list(tasks)}; "
        f"found {_form(batch)}. Change what the dataset yields, or override task_losses(batch) to read it."
    )


def _form(batch: Any) -> str:  # noqa: ANN401
    """What a batch is, for an error."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        kinds = [
            f"a mapping with the keys {sorted(map(str, x))}" if isinstance(x, Mapping) else type(x).__name__
            for x in batch
        ]
        return f"a {type(batch).__name__} of {', '.join(kinds)}"
    return type(batch).__name__


def present_outputs(
    returned: Mapping[str, Tensor | TaskOutput | None], tasks: Sequence[str], device: torch.device
) -> dict[str, TaskOutput]:
    """Check what ``task_losses`` returned and bring it into the tasks' order; None, or no sample, drops a task.

    A loss from elsewhere comes to the module's device, be it a constant, or from a head on a device of its own.

    Raises:
        TypeError: If it is no mapping of tensors or task outputs.
        ValueError: If a task is unknown or a loss is no scalar.
    """
    if not isinstance(returned, Mapping):
        raise TypeError(f"task_losses must return {{task: loss}}, found {type(returned).__name__}.")
    if unknown := [task for task in returned if task not in tasks]:
        raise ValueError(f"task_losses returned the tasks {unknown}, but the module has {list(tasks)}.")
    outputs: dict[str, TaskOutput] = {}
    for task in tasks:
        value = returned.get(task)
        if value is None:
            continue
        output = value if isinstance(value, TaskOutput) else TaskOutput(value)
        if not isinstance(output.loss, Tensor):
            raise TypeError(f"The loss of task {task!r} must be a tensor, found {type(output.loss).__name__}.")
        if output.loss.device != device:
            output = replace(output, loss=output.loss.to(device))
        if output.loss.ndim > 0:
            if output.loss.numel() != 1:
                raise ValueError(
                    f"The loss of task {task!r} must be a scalar, found shape {list(output.loss.shape)}; "
                    "reduce it, by its mean over the labeled samples for instance."
                )
            output = replace(output, loss=output.loss.reshape(()))
        if output.num_samples is None or int(output.num_samples) > 0:
            outputs[task] = output
    return outputs


class LossModule(TaskModule):
    """Makes losses by task of a batch, and hands them to what takes the steps.

    Attributes:
        optimization: What takes the steps.
    """

    optimization: Any  # of a layer above

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # noqa: ANN401
        """Measure, weigh, apply and log one micro-batch; return the loss whose gradient was applied."""
        loss: Tensor | None = self.optimization.run(self, batch, batch_idx)
        if not self.automatic_optimization:
            self.optimization.update.returned = loss
        return loss

    def task_output(self, task: str, prediction: Any, target: Any) -> TaskOutput:  # noqa: ANN401 - any pytree
        """Compute a task's loss on what is labeled, by its ``Task(loss=...)``; see ``Task(missing=...)``.

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
            name_task(error, "loss", task, on_loss(prediction, target))
            raise

    def present_outputs(self, batch: Any, without: Set[str] = frozenset()) -> dict[str, TaskOutput]:  # noqa: ANN401
        """The checked outputs of the tasks that a batch has labels for, in order; none of tasks ``without``."""
        learned = self.learned_tasks
        if without:
            learned = frozenset(self.tasks if learned is None else learned) - without
        if learned is None:
            return present_outputs(self.task_losses(batch), list(self.tasks), self.device)
        found = self.task_losses(without_others(self.in_known_form(batch), self.tasks, learned))
        outputs = present_outputs(found, list(self.tasks), self.device)
        return {task: output for task, output in outputs.items() if task in learned}

    def task_outputs(self, predictions: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, TaskOutput]:
        """Compute :meth:`task_output` for each task that has a target."""
        return {task: self.task_output(task, predictions[task], target) for task, target in targets.items()}

    def penalties_with(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The penalties in a step in which some rank has ``tasks``: what only others use is left where it is."""
        self.present_tasks = tasks
        try:
            return self.penalties()
        finally:
            self.present_tasks = None
