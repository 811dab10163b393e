"""One small trunk of each kind, and modules around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import CGC, MTAN, PLE, DSelectK, MMoE

TASKS = ("a", "b", "c")
INPUTS, HIDDEN, WIDTH = 5, 4, 3


def expert(inputs: int = INPUTS, outputs: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def mtan() -> MTAN:
    return MTAN(
        [nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh()), nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.Tanh())],
        TASKS,
        channels=[HIDDEN, WIDTH],
        layout="tokens",
    )


def mtan_of_maps() -> MTAN:
    """Takes ``[B, 2, H, W]``."""
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh())
    second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, WIDTH, 3, padding=1), nn.Tanh())
    return MTAN([(first, nn.Conv2d(3, 4, 3, padding=1)), second], TASKS, channels=[(3, 4), WIDTH])


def ple(levels: int = 2, task_experts: int = 2, shared_experts: int = 2) -> PLE:
    factories = [expert] + [functools.partial(expert, WIDTH)] * (levels - 1)
    gates = [INPUTS] + [WIDTH] * (levels - 1)
    return PLE(factories, TASKS, gates, task_experts=task_experts, shared_experts=shared_experts)


TRUNKS: Mapping[str, Callable[[], nn.Module]] = {
    "MTAN": mtan,
    "MMoE": lambda: MMoE(expert, TASKS, INPUTS, num_experts=3),
    "CGC": lambda: CGC(expert, TASKS, INPUTS, task_experts=1, shared_experts=2),
    "PLE": ple,
    "DSelectK": lambda: DSelectK(expert, TASKS, gate=INPUTS, num_experts=5, entropy=0.1),
    "static DSelectK": lambda: DSelectK(expert, TASKS, num_experts=4, entropy=0.1),
}


def batch(number: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, INPUTS, generator=generator)
    targets = {task: torch.randint(2, (number, 1), generator=generator).to(dtype) for task in TASKS}
    return x.to(dtype), targets


def module(trunk: nn.Module, **arguments: Any) -> MultiTaskModule:
    """A sigmoid head and an accuracy each."""
    metrics = MetricCollection({"accuracy": BinaryAccuracy()})
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.Adam, lr=0.02)}
    return MultiTaskModule(
        trunk,
        {task: nn.Sequential(nn.Linear(WIDTH, 1), nn.Sigmoid()) for task in TASKS},
        {task: Task(mse_loss, metrics) for task in TASKS},
        **(settings | arguments),
    )


def build(kind: str, **arguments: Any) -> MultiTaskModule:
    torch.manual_seed(3)
    return module(TRUNKS[kind](), **arguments)
