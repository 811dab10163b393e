"""Cross-stitch networks: backbones side by side whose features are mixed between stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.stages import (
    Backbone,
    Chain,
    backbone_per_task,
    check_alike,
    mix,
    mix_channels,
    stages_of,
    wanted_tasks,
)


class CrossStitch(nn.Module):
    r"""Runs one backbone for each task, and mixes the backbones' features between their stages.

    .. math:: \tilde x_i = \sum_j \alpha_{ij}\, x_j

    Each unit has a trainable number for each pair of tasks, or for each pair and channel, and starts near the identity,
    where the backbones are independent. The trunk returns ``{task: features}``.

    Args:
        backbones: ``{task: stages}``, a list of such, or one that is copied for each of ``tasks``. Stages are modules
            in a list or an ``nn.Sequential``, as many for every task; the first takes the trunk's inputs, the others
            what the stage before returned: one tensor, of the same shape for all tasks where a unit follows.
        tasks: The tasks' names where ``backbones`` does not have them.
        after: The stages, counted from 0, that a unit follows; None means all but the last.
        channels: The number of channels after each of these stages for units with a number a channel; None for units
            with one number a pair.
        alpha: What a task starts with of its own features; the others' share 1 - alpha evenly. 1 is the identity.
        channel_dim: Where the channels lie: 1 in images, -1 in tokens.

    Attributes:
        units: One parameter a unit, ``[K, K]`` or ``[K, K, C]``. The paper trains them at 10 to 1000 times the learning
            rate of the backbones: give them a parameter group.

    Raises:
        TypeError: If the backbones are not given as stages, or, in the first batch, a stage returns no tensor.
        ValueError: If the numbers of stages differ, an argument is out of its range, or, in the first batch, shapes do
            not fit.

    Source: Misra et al., Cross-stitch Networks for Multi-task Learning, 2016, arXiv:1604.03539.

    Deviations: for more than two tasks, which the paper leaves open, the rest 1 - alpha is shared evenly. Features are
    not mixed after the last stage unless ``after`` names it. ``shared_parameters()`` leaves out the stages that follow
    the last unit, since each of them serves one task alone.

    Example:
        >>> def backbone():
        ...     return [nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))]
        >>> trunk = CrossStitch({"depth": backbone(), "normals": backbone()}, channels=[8])
        >>> {task: list(features.shape) for task, features in trunk(torch.zeros(2, 4)).items()}
        {'depth': [2, 3], 'normals': [2, 3]}
        >>> trunk.units[0].shape
        torch.Size([2, 2, 8])
    """

    takes_tasks: ClassVar[bool] = True

    def __init__(
        self,
        backbones: Mapping[str, Backbone] | Sequence[Backbone] | nn.Module,
        tasks: Sequence[str] | None = None,
        *,
        after: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        alpha: float = 0.9,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        given = {
            task: stages_of("CrossStitch", task, backbone)
            for task, backbone in backbone_per_task("CrossStitch", backbones, tasks).items()
        }
        self.tasks = tuple(given)
        lengths = {task: len(stages) for task, stages in given.items()}
        self.num_stages = lengths[self.tasks[0]]
        if len(set(lengths.values())) > 1 or not self.num_stages:
            raise ValueError(f"CrossStitch needs as many stages for every task, at least one; found {lengths}.")
        self.after = tuple(range(self.num_stages - 1)) if after is None else tuple(sorted(after))
        if after is None and not self.after:
            raise ValueError(
                "CrossStitch has one stage, and units lie between stages; divide it into stages, or pass after=[0]."
            )
        if any(not 0 <= stage < self.num_stages for stage in self.after) or len(set(self.after)) < len(self.after):
            raise ValueError(
                f"CrossStitch(after={list(self.after)}) must name stages from 0 to {self.num_stages - 1}, each once."
            )
        if channels is not None and (len(channels) != len(self.after) or min(channels, default=1) < 1):
            raise ValueError(
                f"CrossStitch(channels={list(channels)}) must hold a positive number for each of the stages "
                f"{list(self.after)} that a unit follows."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"CrossStitch(alpha={alpha}) must lie between 0 and 1; 1 mixes nothing at first.")
        self.per_channel, self.channel_dim = channels is not None, channel_dim
        self.backbones = nn.ModuleDict({task: nn.ModuleList(stages) for task, stages in given.items()})
        start = near_identity(len(given), alpha)
        self.units = nn.ParameterList(
            nn.Parameter(start.clone() if channels is None else start[..., None].repeat(1, 1, channels[index]))
            for index in range(len(self.after))
        )

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Run the stages; after the last unit only those of ``tasks``, of all tasks where None."""
        wanted = wanted_tasks("CrossStitch", self.tasks, tasks)
        # Up to the last unit every backbone runs, since a unit mixes all of them; after it only the wanted ones run.
        values: dict[str, Any] = {}
        running = self.tasks if self.after else wanted
        for stage in range(self.num_stages):
            if stage == 0:
                values = {task: self._stage(task, 0)(*inputs, **named) for task in running}
            else:
                values = {task: self._stage(task, stage)(values[task]) for task in running}
            if stage in self.after:
                unit = self.after.index(stage)
                mixed = self._stitch(stage, self.units[unit], list(values.values()))
                values = dict(zip(self.tasks, mixed, strict=True))
                running = wanted if unit == len(self.after) - 1 else running
        return {task: values[task] for task in wanted}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the units and the parameters of the stages before them; where there is no unit, all parameters."""
        if not self.after or len(self.tasks) == 1:
            return list(self.parameters())
        before = [self._stage(task, stage) for task in self.tasks for stage in range(self.after[-1] + 1)]
        return [*self.units, *dict.fromkeys(p for stage in before for p in stage.parameters())]

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters of the stages after the last unit; of all stages where there is none."""
        first = self.after[-1] + 1 if self.after else 0
        stages = [self._stage(task, stage) for stage in range(first, self.num_stages)]
        return [parameter for stage in stages for parameter in stage.parameters()]

    def single_task(self, task: str) -> nn.Module:
        """Return the backbone of one task, without units.

        Raises:
            ValueError: If there is no such task.
        """
        wanted_tasks("CrossStitch", self.tasks, [task])
        return Chain([self._stage(task, stage) for stage in range(self.num_stages)])

    def _stage(self, task: str, stage: int) -> nn.Module:
        return self.backbones[task].get_submodule(str(stage))

    def _stitch(self, stage: int, unit: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        check_alike("CrossStitch", stage, values, [f"task {task!r}" for task in self.tasks])
        if not self.per_channel:
            return mix(unit, values)
        shape, dim = values[0].shape, self.channel_dim
        if not -len(shape) <= dim < len(shape) or shape[dim] != unit.shape[-1]:
            raise ValueError(
                f"CrossStitch: stage {stage} returned shape {list(shape)}, which does not have the {unit.shape[-1]} "
                f"channels that channels=... says along channel_dim={dim}."
            )
        return mix_channels(unit, values, dim)


def near_identity(num_tasks: int, alpha: float) -> Tensor:
    """Make a ``[K, K]`` matrix with alpha on the diagonal and rows that sum to 1; with one task the identity.

    Example:
        >>> near_identity(2, 0.75)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    if num_tasks == 1:
        return torch.ones(1, 1)
    others = (1 - alpha) / (num_tasks - 1)
    return torch.full((num_tasks, num_tasks), others).fill_diagonal_(alpha)
