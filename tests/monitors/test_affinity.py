"""Affinities equal trial steps taken by hand, order related and opposed tasks, and group them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.monitors import TaskAffinity
from lightning_mtl.weighting import MGDA, UncertaintyWeighting
from tests.small import batch, batches, small
from tests.training import fit, loader

TASKS = ("a", "b", "c")


def by_hand(module: MultiTaskModule, given: Any, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: descend a copy's trunk along one task's gradient and look at all losses; and its derivative."""

    def losses(of: MultiTaskModule) -> list[torch.Tensor]:
        return [of.tasks[task].loss(of(given[0])[task], given[1][task]) for task in TASKS]

    exact, first_order = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        moved = copy.deepcopy(module)
        parameters = list(moved.trunk.parameters())
        gradients = torch.autograd.grad(losses(moved)[i], parameters)
        for j in range(3):
            others = torch.autograd.grad(losses(moved)[j], parameters)
            first_order[i, j] = lr * sum((a * b).sum() for a, b in zip(gradients, others, strict=True))
        before = [float(loss.detach()) for loss in losses(moved)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(lr * gradient)
        for j in range(3):
            exact[i, j] = 1 - float(losses(moved)[j].detach()) / before[j]
            first_order[i, j] /= before[j]
    return exact, first_order


@pytest.mark.parametrize("weighting", [None, MGDA, functools.partial(MGDA, at="features")], ids=str)
@pytest.mark.parametrize("lr", [None, 0.05])
def test_both_forms_equal_trial_steps(weighting: Any, lr: float | None) -> None:
    module = small(TASKS, optimizer=functools.partial(torch.optim.SGD, lr=0.1)).double()
    inputs, targets = batch(tasks=TASKS)
    given = inputs.double(), {task: target.double() for task, target in targets.items()}
    exact, first_order = by_hand(module, given, lr or 0.1)
    monitors = [TaskAffinity(1, lr=lr, figure=False), TaskAffinity(1, exact=True, lr=lr, figure=False, name="exact")]
    fit(module, loader(given), callbacks=[*monitors, *([] if weighting is None else [weighting()])])
    torch.testing.assert_close(monitors[0].affinity, first_order, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(monitors[1].affinity, exact, atol=1e-10, rtol=1e-8)
    assert (exact - first_order).abs().max() > 1e-5  # the two can be told apart


def test_random_layers_draw_for_a_trial_step_what_they_drew_for_the_loss() -> None:
    module = small(optimizer=functools.partial(torch.optim.SGD, lr=1e-9))
    module.trunk = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    monitor = TaskAffinity(1, exact=True, figure=False)
    fit(module, loader(*batches(8, 8, 8)), callbacks=[monitor, UncertaintyWeighting()])
    assert monitor.affinity.abs().max() < 1e-6  # a step of nothing changes nothing


def constructed(seed: int) -> tuple[MultiTaskModule, list[Any]]:
    """Four tasks read the same number: two want f, two want -f; none has a head that could turn it round."""
    torch.manual_seed(seed)
    read = nn.Linear(8, 1).requires_grad_(False)
    module = MultiTaskModule(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        {task: copy.deepcopy(read) for task in ("up", "down", "up_too", "down_too")},
        {task: Task(mse_loss) for task in ("up", "down", "up_too", "down_too")},
        optimizer=functools.partial(torch.optim.SGD, lr=0.05),
    )
    direction = torch.randn(5, 1)
    data = []
    for _ in range(10):
        inputs = torch.randn(16, 5)
        target = torch.tanh(inputs @ direction)
        signs = {"up": 1, "down": -1, "up_too": 1, "down_too": -1}
        data.append((inputs, {task: sign * target + 0.3 * torch.randn(16, 1) for task, sign in signs.items()}))
    return module, data


@pytest.mark.parametrize("seed", range(10))
def test_related_and_opposed_tasks_are_told_apart(seed: int) -> None:
    module, data = constructed(seed)
    monitors = [TaskAffinity(1, figure=False), TaskAffinity(1, exact=True, figure=False, name="exact")]
    fit(module, loader(*data), callbacks=monitors)
    for monitor in monitors:
        z = monitor.affinity
        related = torch.stack([z[0, 2], z[2, 0], z[1, 3], z[3, 1]])
        opposed = torch.stack([z[0, 1], z[1, 0], z[0, 3], z[3, 0], z[2, 1], z[1, 2], z[2, 3], z[3, 2]])
        assert related.min() > 0 > opposed.max()
        assert monitor.groups(2) == [["up", "up_too"], ["down", "down_too"]]


def test_a_loss_that_is_not_positive_is_left_out() -> None:
    def negative(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(prediction, target) - 100

    module = small()
    module.tasks["b"].loss = negative
    monitor = TaskAffinity(1, figure=False)
    fit(module, loader(batch()), callbacks=[monitor])
    assert monitor.affinity.isnan().tolist() == [[False, True], [False, True]]


def test_several_learning_rates_and_wrong_arguments_are_refused() -> None:
    class TwoRates(MultiTaskModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            first, *rest = self.parameters()
            return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.2}])

    with pytest.raises(ValueError, match=r"which have \[0.1, 0.2\]; give one: TaskAffinity\(lr="):
        fit(small(cls=TwoRates), loader(batch()), callbacks=[TaskAffinity(figure=False)])
    fit(small(cls=TwoRates), loader(batch()), callbacks=[TaskAffinity(1, lr=0.1, figure=False)])
    with pytest.raises(ValueError, match="exact=True, at='features'"):
        TaskAffinity(at="features", exact=True)
    with pytest.raises(ValueError, match=r"lr=0.0\) must be above 0"):
        TaskAffinity(lr=0.0)
