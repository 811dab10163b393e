"""Plain descent with a learning rate a task, written out: no optimizer, no scheduler, one loss at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from tests.small import TASKS, batch, small

BY_HAND = {"a": 0.3, "b": 2.0}
DECAY = 0.5


def double_small(**arguments: Any) -> MultiTaskModule:
    return small(**arguments).double()


def double_batches(number: int, size: int = 4) -> list[Any]:
    drawn = [batch(size, seed) for seed in range(number)]
    return [(x.double(), {task: y.double() for task, y in targets.items()}) for x, targets in drawn]


def gradients(
    module: MultiTaskModule, batches: Sequence[Any], task: str, parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    """The gradient of one task's mean loss over a window."""
    losses = [mse_loss(module.heads[task](module.trunk(x)), targets[task]) for x, targets in batches]
    return list(torch.autograd.grad(torch.stack(losses).mean(), parameters))


class Norms:
    """The factor of ``GradientNorm(decay=DECAY)`` by its formula, in plain numbers."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}

    def take(self, newest: dict[str, float]) -> None:
        for task, norm in newest.items():
            self.means[task] = DECAY * self.means[task] + (1 - DECAY) * norm if task in self.means else norm

    def factor(self, task: str) -> float:
        return sum(self.means.values()) / len(self.means) / self.means[task] if self.means else 1.0


def descend(
    module: MultiTaskModule,
    windows: Iterable[Sequence[Any]],
    rates: Sequence[float],
    *,
    every: int = 1,
    shares_trunk: bool = False,
    weights: dict[str, float] | None = None,
) -> MultiTaskModule:
    """Take a step a window: what is set by hand times the inverse norms, computed before one step in ``every``."""
    module, norms, weight = copy.deepcopy(module), Norms(), weights or dict.fromkeys(TASKS, 1.0)
    multiplier: dict[str, float] = {}
    for step, (window, rate) in enumerate(zip(windows, rates, strict=True)):
        if step % every == 0:
            multiplier = {task: BY_HAND[task] * norms.factor(task) for task in TASKS}
        trunk, changes, newest = list(module.trunk.parameters()), [], {}
        for task in TASKS:
            head = list(module.heads[task].parameters())
            found = [weight[task] * g for g in gradients(module, window, task, [*head, *trunk])]
            of_head, of_trunk = found[: len(head)], found[len(head) :]
            newest[task] = float(torch.cat([g.flatten() for g in of_head]).norm())
            share = multiplier[task] if shares_trunk else 1.0
            changes += [(p, rate * multiplier[task] * g) for p, g in zip(head, of_head, strict=True)]
            changes += [(p, rate * share * g) for p, g in zip(trunk, of_trunk, strict=True)]
        with torch.no_grad():
            for parameter, change in changes:
                parameter.sub_(change)
        norms.take(newest)
    return module
