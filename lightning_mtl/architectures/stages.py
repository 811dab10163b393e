"""Backbones in stages: checks of what trunks are given, and functions that run and mix stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.task.names import check_task_name

Backbone = nn.Module | Sequence[nn.Module]
"""One module, or its stages in the order they run; an ``nn.Sequential`` is both."""


class Chain(nn.Module):
    """Runs modules one after the other; the first takes any arguments.

    Example:
        >>> import torch
        >>> Chain([nn.Bilinear(2, 2, 3), nn.ReLU()])(torch.ones(1, 2), torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the stages take and return
        """Run the stages."""
        first, *rest = self.stages
        value = first(*inputs, **named)
        for stage in rest:
            value = stage(value)
        return value


def backbone_per_task(owner: str, backbones: Any, tasks: Sequence[str] | None) -> dict[str, Any]:  # noqa: ANN401
    """Arrange backbones by task; a single one is copied for each.

    Args:
        owner: The architecture's name, for errors.
        backbones: ``{task: backbone}``, a sequence with one for each of ``tasks``, or a single module that is copied.
        tasks: The tasks' names where ``backbones`` does not have them.

    Raises:
        TypeError: If ``backbones`` is none of these.
        ValueError: If names are missing, cannot name a module or are too few or many, or one module is given twice.
    """
    if isinstance(backbones, Mapping | nn.ModuleDict):
        if tasks is not None and list(tasks) != list(backbones.keys()):
            raise ValueError(f"{owner}(tasks={list(tasks)}) is not what backbones names, {list(backbones)}; omit it.")
        found = dict(backbones.items())
    else:
        found = _named_backbones(owner, backbones, tasks)
    if not found:
        raise ValueError(f"{owner}(backbones=...) is empty; give it one backbone a task.")
    for task in found:
        check_task_name(task)
    owned: dict[int, str] = {}
    for task, backbone in found.items():
        for part in backbone if isinstance(backbone, Sequence) else [backbone]:
            if not isinstance(part, nn.Module):
                raise TypeError(f"{owner}: the backbone of task {task!r} holds a {type(part).__name__}, no module.")
            if owned.setdefault(id(part), task) != task:
                raise ValueError(
                    f"{owner}: the tasks {owned[id(part)]!r} and {task!r} are given the same module object; give each "
                    "its own, or one module and tasks=[...] to have it copied."
                )
    return found


def _named_backbones(owner: str, backbones: Any, tasks: Sequence[str] | None) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(backbones, nn.Module | Sequence) or isinstance(backbones, str):
        raise TypeError(
            f"{owner}(backbones=...) must be {{task: backbone}}, a list of them or one module to copy, found "
            f"{type(backbones).__name__}."
        )
    if tasks is None or isinstance(tasks, str):
        raise ValueError(f"{owner}(tasks={tasks!r}) must name the tasks, as backbones does not: tasks=['a', 'b'].")
    checked_tasks(tasks, owner)
    if isinstance(backbones, nn.Module) and not isinstance(backbones, nn.ModuleList):
        return {task: copy.deepcopy(backbones) for task in tasks}
    if len(backbones) != len(tasks):
        raise ValueError(f"{owner} was given {len(backbones)} backbones for the {len(tasks)} tasks {list(tasks)}.")
    return dict(zip(tasks, backbones, strict=True))


def stages_of(owner: str, task: str, backbone: Any) -> list[nn.Module]:  # noqa: ANN401 - what is checked here
    """Return the stages of one task's backbone.

    Raises:
        TypeError: If it is no sequence of modules.
    """
    if isinstance(backbone, nn.Sequential | nn.ModuleList):
        return list(backbone)
    if isinstance(backbone, nn.Module) or not isinstance(backbone, Sequence):
        raise TypeError(
            f"{owner}: the backbone of task {task!r} must be its stages in order, a list of modules or an "
            f"nn.Sequential, found {type(backbone).__name__}."
        )
    return list(backbone)


def wanted_tasks(owner: str, own: Sequence[str], tasks: Sequence[str] | None) -> Sequence[str]:
    """Return the tasks to compute features for, all of ``own`` where None.

    Raises:
        ValueError: If one of them is unknown.
    """
    if tasks is None:
        return own
    if unknown := [task for task in tasks if task not in own]:
        raise ValueError(f"{owner} has the tasks {list(own)}, but was asked for {unknown}; name heads and tasks alike.")
    return tasks


def all_but_own(trunk: Any) -> list[nn.Parameter]:  # noqa: ANN401 - an Owned module
    """Return the parameters of a trunk that belong to no single task."""
    own = {parameter for task in trunk.tasks for parameter in trunk.own_parameters(task)}
    return [parameter for parameter in trunk.parameters() if parameter not in own]


def check_alike(owner: str, stage: int, values: Sequence[Any], sources: Sequence[str]) -> None:
    """Check that what a stage's modules returned can be added up.

    Raises:
        TypeError: If something is no tensor.
        ValueError: If shapes differ.
    """
    for source, value in zip(sources, values, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{owner}: stage {stage} of {source} returned a {type(value).__name__}, not one tensor.")
        if value.shape != values[0].shape:
            raise ValueError(
                f"{owner}: after stage {stage}, {source} has shape {list(value.shape)} and {sources[0]} "
                f"{list(values[0].shape)}; what is mixed must have equal shapes."
            )


def mix(weights: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    r"""Compute :math:`y_i = \sum_j w_{ij} x_j`.

    One matrix product: 1.5 to 4 times as fast as sums of products, measured forward and backward on one core.

    Args:
        weights: ``[I, J]``.
        values: J tensors of one shape.

    Returns:
        I tensors of that shape.

    Example:
        >>> mix(torch.tensor([[1.0, 0.5]]), [torch.ones(2), 2 * torch.ones(2)])
        [tensor([2., 2.])]
    """
    stacked = torch.stack(list(values))
    mixed = weights.to(stacked.dtype) @ stacked.flatten(1)
    return list(mixed.view(len(weights), *stacked.shape[1:]).unbind())


def mix_channels(weights: Tensor, values: Sequence[Tensor], channel_dim: int) -> list[Tensor]:
    r"""Compute :math:`y_{ic} = \sum_j w_{ijc} x_{jc}`, c running along ``channel_dim``.

    Args:
        weights: ``[I, J, C]``.
        values: J tensors of one shape, C along ``channel_dim``.
        channel_dim: Where the channels lie.

    Returns:
        I tensors of that shape.

    Example:
        >>> mix_channels(torch.tensor([[[1.0, 2.0]]]), [torch.ones(1, 2)], channel_dim=1)
        [tensor([[1., 2.]])]
    """
    shape = [1] * values[0].ndim
    shape[channel_dim] = -1
    mixed = []
    for row in weights.to(values[0].dtype).view(*weights.shape[:2], *shape).unbind():
        total = row[0] * values[0]
        for weight, value in zip(row[1:].unbind(), values[1:], strict=True):
            total = torch.addcmul(total, weight, value)
        mixed.append(total)
    return mixed


def checked_tasks(tasks: Sequence[str], who: str) -> tuple[str, ...]:
    """Check the names of the tasks that a trunk has parts for.

    Raises:
        ValueError: If there is none, or one comes twice.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"{who}(tasks={tasks!r}) must be a sequence of one task or more.")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"{who}(tasks={list(tasks)}) names a task twice.")
    return tuple(tasks)


def call(module: nn.Module, x: Tensor, who: str) -> Tensor:
    """Call a module; an error names the module if it cannot take its input.

    Raises:
        ValueError: If the module raises one of torch's errors.
    """
    output: Tensor
    if torch.compiler.is_compiling():
        output = module(x)
        return output
    try:
        output = module(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"{who} failed on an input of shape {list(x.shape)}: {error}") from error
    return output
