"""Features keep their layout in memory: the trunk's backward pass begins with their strides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradDrop, UncertaintyWeighting
from tests.training import fit, flat_parameters, loader

SHAPE = (2, 3, 4, 5)


class Seen(torch.autograd.Function):
    """Notes the strides of the gradient that passes."""

    strides: list[tuple[int, ...]]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Seen.strides.append(gradients[0].stride())
        return gradients[0]


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = Seen.apply(self.layer(x))  # type: ignore[no-untyped-call]
        return seen


def trained(make: Callable[[], Weighting], layout: torch.memory_format) -> Tensor:
    torch.manual_seed(0)
    heads = {task: nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten()) for task in ("a", "b")}
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    module = MultiTaskModule(Trunk(), heads, {task: Task(mse_loss) for task in heads}, optimizer=sgd)
    module.to(memory_format=layout)
    inputs = torch.randn(2, 2, 4, 5).to(memory_format=layout)
    Seen.strides = []
    fit(module, loader(*[(inputs, {task: torch.randn(2, 20) for task in heads})] * 2), callbacks=[make()])
    return flat_parameters(module)


@pytest.mark.parametrize("make", [functools.partial(MGDA, at="features"), UncertaintyWeighting])
def test_channels_last_stays(make: Callable[[], Weighting]) -> None:
    expected = trained(make, torch.contiguous_format)
    assert set(Seen.strides) == {torch.empty(SHAPE).stride()}
    found = trained(make, torch.channels_last)
    assert set(Seen.strides) == {torch.empty(SHAPE, memory_format=torch.channels_last).stride()}
    torch.testing.assert_close(found, expected)


def test_channels_last_stays_where_gradients_are_combined_without_weights() -> None:
    trained(functools.partial(GradDrop, at="features"), torch.channels_last)
    assert set(Seen.strides) == {torch.empty(SHAPE, memory_format=torch.channels_last).stride()}
