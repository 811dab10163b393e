"""The architectures as one writes them in plain torch for a project of one's own: what ours are timed against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs), nn.ReLU())


def mixture(gate: nn.Module, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    return torch.einsum("be,ebd->bd", gate(x).softmax(1), torch.stack(list(outputs)))


class MMoE(nn.Module):
    """Experts one after another, one einsum a task."""

    def __init__(self, width: int, num_experts: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(width, width) for _ in range(num_experts))
        self.gates = nn.ModuleDict({task: nn.Linear(width, num_experts, bias=False) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = [expert(x) for expert in self.experts]
        return {task: mixture(gate, x, outputs) for task, gate in self.gates.items()}


class BatchedMMoE(nn.Module):
    """All experts in one product a layer, all tasks in one product."""

    def __init__(self, width: int, num_experts: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks, bound = tasks, width**-0.5
        shapes = ((num_experts, width, width), (num_experts, 1, width)) * 2
        self.weights = nn.ParameterList(torch.empty(*shape).uniform_(-bound, bound) for shape in shapes)
        self.gates = nn.ModuleDict({task: nn.Linear(width, num_experts, bias=False) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        w1, b1, w2, b2 = self.weights
        hidden = torch.baddbmm(b1, x.expand(len(w1), -1, -1), w1).relu()
        outputs = torch.baddbmm(b2, hidden, w2).relu()
        weights = torch.stack([gate(x).softmax(1) for gate in self.gates.values()], 1)
        return dict(zip(self.tasks, torch.bmm(weights, outputs.transpose(0, 1)).unbind(1), strict=True))


class PLE(nn.Module):
    """Lists of experts, one einsum a stream."""

    def __init__(self, width: int, levels: int, own: int, shared: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tasks
        numbers = dict.fromkeys(tasks, own) | {"shared": shared}
        self.experts = nn.ModuleList(
            nn.ModuleDict({k: nn.ModuleList(mlp(width, width) for _ in range(n)) for k, n in numbers.items()})
            for _ in range(levels)
        )
        self.gates = nn.ModuleList(
            nn.ModuleDict({k: nn.Linear(width, own + shared, bias=False) for k in tasks}) for _ in range(levels)
        )
        everything = len(tasks) * own + shared
        self.shared_gates = nn.ModuleList(nn.Linear(width, everything, bias=False) for _ in range(levels - 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        streams = dict.fromkeys((*self.tasks, "shared"), x)
        for level, (experts, gates) in enumerate(zip(self.experts, self.gates, strict=True)):
            outputs = {k: [expert(streams[k]) for expert in experts[k]] for k in streams}  # type: ignore[index]
            after = {k: mixture(gates[k], streams[k], outputs[k] + outputs["shared"]) for k in self.tasks}  # type: ignore[index]
            if level < len(self.shared_gates):
                everything = [output for found in outputs.values() for output in found]
                after["shared"] = mixture(self.shared_gates[level], streams["shared"], everything)
            streams = after
        return {task: streams[task] for task in self.tasks}


def masks(inputs: int, outputs: int) -> nn.Sequential:
    first = (nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Sigmoid())


class MTAN(nn.Module):
    """Stages of which each but the first halves the size."""

    def __init__(self, stages: Sequence[nn.Module], tasks: Sequence[str], channels: Sequence[int]) -> None:
        super().__init__()
        self.tasks, self.stages = tasks, nn.ModuleList(stages)
        pairs = itertools.pairwise(channels)
        self.attention = nn.ModuleList(
            nn.ModuleDict({task: masks(c if j == 0 else 2 * c, c) for task in tasks}) for j, c in enumerate(channels)
        )
        self.passing = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for j, stage in enumerate(self.stages):
            x = stage(x)
            for task in self.tasks:
                seen = x if j == 0 else torch.cat([x, max_pool2d(self.passing[j - 1](found[task]), 2)], 1)
                found[task] = self.attention[j][task](seen) * x  # type: ignore[index]
        return found
