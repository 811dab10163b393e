"""Backbones for several tasks, whole or cut into stages: how they are given, checked and run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_mtl.task.task import check_task_name

Backbone = nn.Module | Sequence[nn.Module]
"""One module, or its stages in the order they run; an ``nn.Sequential`` is both."""


class Chain(nn.Module):
    """Modules one after the other, of which the first takes whatever it is called with.

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


def per_task(owner: str, backbones: Any, tasks: Sequence[str] | None) -> dict[str, Any]:  # noqa: ANN401
    """Give each task a backbone of its own.

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
        found = _named(owner, backbones, tasks)
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


def _named(owner: str, backbones: Any, tasks: Sequence[str] | None) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(backbones, nn.Module | Sequence) or isinstance(backbones, str):
        raise TypeError(
            f"{owner}(backbones=...) must be {{task: backbone}}, a list of them or one module to copy, found "
            f"{type(backbones).__name__}."
        )
    if tasks is None or isinstance(tasks, str):
        raise ValueError(f"{owner}(tasks={tasks!r}) must name the tasks, as backbones does not: tasks=['a', 'b'].")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"{owner}(tasks={list(tasks)}) names a task twice.")
    if isinstance(backbones, nn.Module) and not isinstance(backbones, nn.ModuleList):
        return {task: copy.deepcopy(backbones) for task in tasks}
    if len(backbones) != len(tasks):
        raise ValueError(f"{owner} was given {len(backbones)} backbones for the {len(tasks)} tasks {list(tasks)}.")
    return dict(zip(tasks, backbones, strict=True))


def stages_of(owner: str, task: str, backbone: Any) -> list[nn.Module]:  # noqa: ANN401 - what is checked here
    """The stages of one task's backbone.

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
    """The tasks to compute features for, all of ``own`` where None.

    Raises:
        ValueError: If one of them is unknown.
    """
    if tasks is None:
        return own
    if unknown := [task for task in tasks if task not in own]:
        raise ValueError(f"{owner} has the tasks {list(own)}, but was asked for {unknown}; name heads and tasks alike.")
    return tasks


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
