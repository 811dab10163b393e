"""MTAN: a shared backbone whose features each task masks by attention, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, interpolate

from lightning_mtl.architectures.stages import all_but_own, call, checked_tasks, wanted_tasks
from lightning_mtl.monitors.gates import GateMeter, GateTable

Layout: TypeAlias = Literal["maps", "tokens"]
"""How features lie in a tensor: ``"maps"`` are ``[B, C, H, W]``, ``"tokens"`` ``[B, ..., C]``."""


def check_layout(layout: Layout) -> Layout:
    """Check a layout.

    Raises:
        ValueError: If it is unknown.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"MTAN(layout={layout!r}) must be 'maps' for [B, C, H, W] or 'tokens' for [B, T, C].")
    return layout


def projection(layout: Layout, inputs: int, outputs: int, kernel: int = 1) -> list[nn.Module]:
    """Make a linear map of the channels and a norm that suits the layout; tokens are mapped one by one."""
    if layout == "maps":
        # The norm takes out any bias.
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return [nn.Linear(inputs, outputs), nn.LayerNorm(outputs)]


class AttentionMask(nn.Sequential):
    """Computes a mask by g and h: two maps of the channels, a ReLU between them and a sigmoid at the end."""

    def __init__(self, layout: Layout, inputs: int, outputs: int) -> None:
        super().__init__(
            *projection(layout, inputs, outputs), nn.ReLU(), *projection(layout, outputs, outputs), nn.Sigmoid()
        )


class Passing(nn.Sequential):
    """Maps masked features to the channels of the next stage, the paper's f; for maps with a 3x3 convolution."""

    def __init__(self, layout: Layout, inputs: int, outputs: int) -> None:
        super().__init__(*projection(layout, inputs, outputs, kernel=3), nn.ReLU())


def resize_maps(maps: Tensor, like: Tensor) -> Tensor:
    """Resize maps to the height and width of others: by max pooling where they shrink, bilinearly where they grow."""
    size = list(like.shape[-2:])
    if list(maps.shape[-2:]) == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return adaptive_max_pool2d(maps, size)
    return interpolate(maps, size, mode="bilinear", align_corners=False)


CLOSED = 0.1
"""Attention below this counts as closed in the statistics."""


class MTAN(nn.Module):
    r"""Masks the features of a shared backbone softly, for each task and stage (multi-task attention network).

    .. math:: \hat a_k^1 = h_k^1(g_k^1(u^1)) \odot p^1, \qquad
        \hat a_k^j = h_k^j(g_k^j([u^j; f^j(\hat a_k^{j-1})])) \odot p^j

    :math:`u^j` and :math:`p^j` are the features in the middle and at the end of stage j, :math:`\odot` multiplies
    element by element. g and h map the channels; f, which all tasks share, brings masked features to the next stage.
    For maps they are 1x1, 1x1 and 3x3 convolutions with batch norm, and f ends in max pooling to the size of
    :math:`u^j`; for tokens they are linear with layer norm.

    Args:
        stages: The backbone in order: modules that take each other's output; or pairs ``(first, last)`` of them, where
            u is the first's output and p the last's. For a single module u and p are both its output.
        tasks: The tasks' names, as the heads have them.
        channels: For each stage the channels of its output, or a pair of those of u and of p.
        layout: ``"maps"`` for ``[B, C, H, W]``, ``"tokens"`` for ``[B, T, C]`` or ``[B, C]``, whose number T must then
            not change between stages.

    Shapes: whatever the first stage takes, to ``{task: the shape of the last stage's output}``.

    Raises:
        ValueError: If lengths differ or a number is out of range; in ``forward``, naming the stage, if what a stage
            returns does not have the channels or the layout it should have.
        TypeError: If a stage is no module.

    Each task has an output of its own, so that ``at="features"`` finds gradients that never conflict; measure at the
    trunk. :meth:`shared_parameters` are those of the backbone and of f.

    Source: Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, arXiv:1803.10704.

    Deviations: the paper takes u inside a block; with a single module a stage, u is the stage's output. The official
    code's layers in front of a norm have biases, which the norm takes out. Where maps grow, corners are not aligned.

    Example:
        >>> stages = [nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1))]
        >>> trunk = MTAN(stages, ["depth", "normals"], channels=[8, 16])
        >>> {task: list(z.shape) for task, z in trunk(torch.zeros(2, 3, 8, 8)).items()}
        {'depth': [2, 16, 4, 4], 'normals': [2, 16, 4, 4]}
    """

    takes_tasks: ClassVar[bool] = True

    def __init__(
        self,
        stages: Sequence[nn.Module | tuple[nn.Module, nn.Module]],
        tasks: Sequence[str],
        channels: Sequence[int | tuple[int, int]],
        *,
        layout: Layout = "maps",
    ) -> None:
        super().__init__()
        self.tasks, self.layout = checked_tasks(tasks, "MTAN"), check_layout(layout)
        self.stages = nn.ModuleList(_as_module(stage, number) for number, stage in enumerate(stages))
        self.channels = [_as_pair(entry, number) for number, entry in enumerate(channels)]
        if not self.stages or len(self.stages) != len(self.channels):
            raise ValueError(
                f"MTAN takes the channels of each stage, found {len(self.stages)} stages and {len(self.channels)} "
                "entries in channels."
            )
        middle, end = [u for u, _ in self.channels], [p for _, p in self.channels]
        inputs = [middle[0], *(2 * u for u in middle[1:])]
        self.attention = nn.ModuleDict(
            {
                task: nn.ModuleList(AttentionMask(layout, i, o) for i, o in zip(inputs, end, strict=True))
                for task in self.tasks
            }
        )
        self.passing = nn.ModuleList(Passing(layout, o, i) for o, i in zip(end[:-1], middle[1:], strict=True))
        self.gate_meter = GateMeter()

    def forward(self, x: Tensor, *, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Pass the input through the backbone, masked for each of ``tasks``, for all tasks where None."""
        wanted = wanted_tasks("MTAN", self.tasks, tasks)
        masked: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages):
            u, x = self._features(number, stage, x)
            masked = {task: self._attend(task, number, u, x, masked.get(task)) for task in wanted}
        return masked

    def _attend(self, task: str, number: int, u: Tensor, p: Tensor, before: Tensor | None) -> Tensor:
        if before is not None:
            u = torch.cat([u, self._pass_on(number, before, u)], 1 if self.layout == "maps" else -1)
        mask: Tensor = self.attention.get_submodule(f"{task}.{number}")(u)
        if self.training and self.gate_meter.gathering:
            flat = mask.detach().flatten(1)
            found = torch.stack([flat.mean(1), (flat < CLOSED).to(flat.dtype).mean(1)], 1)
            self.gate_meter.add(f"{task}.{number}", found)
        if mask.shape != p.shape:
            raise ValueError(
                f"In stage {number} of MTAN the masks have shape {list(mask.shape)} and the features they are for "
                f"{list(p.shape)}; let only the first part of a stage change the size."
            )
        return mask * p

    def _pass_on(self, number: int, before: Tensor, u: Tensor) -> Tensor:
        passed: Tensor = self.passing[number - 1](before)
        if self.layout == "maps":
            return resize_maps(passed, u)
        if passed.shape != u.shape:
            raise ValueError(
                f"Stage {number} of MTAN turned tokens of shape {list(before.shape)} into {list(u.shape)}; their "
                "number must stay. Return [B, C, H, W] from the stages and use layout='maps' to have it change."
            )
        return passed

    def _features(self, number: int, stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        who = f"Stage {number} of MTAN"
        if isinstance(stage, nn.ModuleList):
            u = call(stage[0], x, who)
            p = call(stage[1], u, who)
        else:
            u = p = call(stage, x, who)
        for features, channels in zip((u, p), self.channels[number], strict=True):
            self._check(features, channels, who)
        return u, p

    def _check(self, features: Tensor, channels: int, who: str) -> None:
        dimension = 1 if self.layout == "maps" else -1
        if features.ndim < 2 or (self.layout == "maps" and features.ndim != 4):
            needed = "[B, C, H, W], for layout='maps'" if self.layout == "maps" else "[B, T, C], for layout='tokens'"
            raise ValueError(f"{who} returned shape {list(features.shape)}; it must be {needed}.")
        if features.shape[dimension] != channels:
            raise ValueError(
                f"{who} returned shape {list(features.shape)}, {features.shape[dimension]} channels; channels=... says "
                f"{channels} for this stage."
            )

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the backbone and of f, which passes masked features on."""
        return all_but_own(self)

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters of a task's attention."""
        return list(self.attention.get_submodule(task).parameters())

    def gate_statistics(self) -> dict[str, Tensor | GateTable]:
        """Return each mask's mean by task and stage, and for each task the share of its masks below 0.1."""
        table = torch.full((2, len(self.tasks), len(self.stages)), torch.nan)
        for row, task in enumerate(self.tasks):
            for column in range(len(self.stages)):
                if (mean := self.gate_meter.mean(f"{task}.{column}")) is not None:
                    table[:, row, column] = mean.cpu()
        columns = tuple(f"stage {number}" for number in range(len(self.stages)))
        # The last stage's mask is what the head sees through; a mean over stages is what a scalar has room for.
        return {"attention": GateTable(table[0], self.tasks, columns), "attention_sparsity": table[1].mean(1)}


def _as_module(stage: object, number: int) -> nn.Module:
    given: list[object] = list(stage) if isinstance(stage, tuple | list | nn.ModuleList) else [stage]
    parts = [part for part in given if isinstance(part, nn.Module)]
    if len(parts) < len(given):
        raise TypeError(
            f"Stage {number} of MTAN must be a torch.nn.Module or a pair of them, found {type(stage).__name__}."
        )
    if len(parts) == 1 and parts[0] is stage:
        return parts[0]
    if len(parts) != 2:
        raise ValueError(f"Stage {number} of MTAN has {len(parts)} parts; give one module or a pair (first, last).")
    return nn.ModuleList(parts)


def _as_pair(entry: int | tuple[int, int], number: int) -> tuple[int, int]:
    u, p = (entry, entry) if isinstance(entry, int) else entry
    if u < 1 or p < 1:
        raise ValueError(f"MTAN(channels=...) gives stage {number} {entry}; channels must be at least 1.")
    return u, p
