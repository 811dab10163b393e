"""Batches with labels for some samples of some tasks, cut over ranks, and the module that learns from them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task, TaskOutput

INPUTS, WIDTH, SAMPLES = 6, 12, 8
CLASSES = {"age": 3, "smile": 2, "pose": 4}
SCALES = {"age": 1.0, "smile": 1.0, "pose": 5.0}
TASKS = tuple(CLASSES)

Pattern = Literal["complete", "counted", "uncounted", "loaders"]
"""Who has labels: everyone; some samples, whose number is told; some, untold; some, each task with its own inputs."""
Trunk = Literal["plain", "batch norm", "branches"]


@dataclass
class Part:
    """What one rank sees of a batch, and which of its samples have a label of each task."""

    inputs: Tensor
    targets: dict[str, Tensor]
    labeled: dict[str, Tensor]


def labeled(index: int, task: int) -> Tensor:
    """Which of a batch's samples have a label of a task; rank r of two gets the samples r, r + 2, r + 4, ..."""
    sample = torch.arange(SAMPLES)
    if index % 7 == 5:
        return sample < 0  # nothing at all
    if index % 7 == 6:
        return sample % 2 == 0  # a rank without a label
    ways = [sample < 0, sample % 2 == 0, sample % 2 == 1, sample < 3, sample >= 0]
    return ways[(index + task) % 5]


def batches(count: int, pattern: Pattern) -> list[Part]:
    """The same whole batches in every process."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for index in range(count):
        inputs = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        targets = {task: torch.randint(classes, (SAMPLES,), generator=generator) for task, classes in CLASSES.items()}
        everyone = torch.ones(SAMPLES, dtype=torch.bool)
        has = {task: everyone if pattern == "complete" else labeled(index, k) for k, task in enumerate(TASKS)}
        parts.append(Part(inputs, targets, has))
    return parts


def cut(part: Part, rank: int, ranks: int) -> Part:
    """A rank's share of a batch."""
    mine = slice(rank, None, ranks)
    return Part(
        part.inputs[mine],
        {task: target[mine] for task, target in part.targets.items()},
        {task: has[mine] for task, has in part.labeled.items()},
    )


class Branches(nn.Module):
    """A trunk with a branch for every task."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, 16)
        self.branches = nn.ModuleDict({task: nn.Linear(16, WIDTH) for task in TASKS})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        stem = torch.tanh(self.stem(inputs))
        return {task: torch.tanh(branch(stem)) for task, branch in self.branches.items()}


def make_trunk(kind: Trunk) -> nn.Module:
    if kind == "branches":
        return Branches()
    norm = [nn.BatchNorm1d(16)] if kind == "batch norm" else []
    return nn.Sequential(nn.Linear(INPUTS, 16), *norm, nn.Tanh(), nn.Linear(16, WIDTH), nn.Tanh())


def _scaled_cross_entropy(scale: float, prediction: Tensor, target: Tensor) -> Tensor:
    return scale * cross_entropy(prediction, target)


class Faces(MultiTaskModule):
    """Learns from lists of parts: one rank's own, or, in one process, those of all ranks that it stands for."""

    def __init__(self, trunk: Trunk, pattern: Pattern, *, metrics: bool, **arguments: Any) -> None:
        torch.manual_seed(0)
        settings = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=0.01)} | arguments
        super().__init__(
            make_trunk(trunk),
            {task: nn.Linear(WIDTH, classes) for task, classes in CLASSES.items()},
            {
                task: Task(
                    functools.partial(_scaled_cross_entropy, SCALES[task]),
                    MetricCollection({"accuracy": MulticlassAccuracy(classes, average="micro")}) if metrics else None,
                )
                for task, classes in CLASSES.items()
            },
            **settings,
        )
        self.pattern = pattern
        self.double()

    def task_losses(self, batch: Sequence[Part]) -> Mapping[str, Tensor | TaskOutput]:
        if len(batch) == 1:
            return self._part_losses(batch[0])
        # Without counts, the mean over the ranks that have the task.
        found = [self._part_losses(part) for part in batch]
        means: dict[str, Tensor | TaskOutput] = {}
        for task in TASKS:
            losses = [outputs[task].loss for outputs in found if task in outputs]
            if losses:
                means[task] = torch.stack(losses).mean()
        return means

    def _part_losses(self, part: Part) -> dict[str, TaskOutput]:
        if self.pattern == "complete":
            return self._checked(super().task_losses((part.inputs, part.targets)))
        has = {task: mask for task, mask in part.labeled.items() if mask.any()}
        if self.pattern == "loaders":
            # What task_losses does with batches of each task's own, which it refuses at the features.
            own = {task: self._predict(part.inputs[mask], [task])[task] for task, mask in has.items()}
            return self._checked(
                {task: self.task_output(task, own[task], part.targets[task][has[task]]) for task in own}
            )
        predictions = self(part.inputs)
        outputs = {}
        for task, mask in has.items():
            prediction, target = predictions[task][mask], part.targets[task][mask]
            count = int(mask.sum()) if self.pattern == "counted" else None
            outputs[task] = TaskOutput(self.tasks[task].loss(prediction, target), prediction, target, count)
        return outputs

    @staticmethod
    def _checked(outputs: Mapping[str, Tensor | TaskOutput]) -> dict[str, TaskOutput]:
        found = {task: output for task, output in outputs.items() if isinstance(output, TaskOutput)}
        assert found.keys() == outputs.keys()
        return found
