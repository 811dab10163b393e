"""The two losses in two parameters of CAGrad, Nash-MTL and FAMO: as torch code, and with gradients in plain floats.

L_1 is 0.1 times as long as it would be if the tasks were alike. Above x2 = 0 both losses have a thin, curved valley;
below they are two paraboloids whose compromises are the Pareto front. The signs are the released code's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule, Task

TASKS = ("1", "2")
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of L_1
FLOOR = 5e-6
LOWER_BOUNDS = (-2.0, -20.0)  # no point has lower losses: subtracted, they make all of them positive
FRONT_ENDS = (-7.0, 7.0)  # of x1

Evaluated = tuple[tuple[float, float], tuple[tuple[float, float], tuple[float, float]]]


def at_least(x: Tensor, bound: float) -> Tensor:
    """The larger of both; the gradient passes at the bound, where ``clamp`` stops it from torch 2.14 on."""
    return torch.where(x >= bound, x, bound)


def toy_losses(theta: Tensor) -> tuple[Tensor, Tensor]:
    """L_1 and L_2 at the points in the last dimension of ``theta``, ``[..., 2]``."""
    x1, x2 = theta[..., 0], theta[..., 1]
    f1 = at_least((0.5 * (-x1 - 7) - torch.tanh(-x2)).abs(), FLOOR).log() + 6
    f2 = at_least((0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs(), FLOOR).log() + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = at_least(torch.tanh(x2 / 2), 0.0), at_least(torch.tanh(-x2 / 2), 0.0)
    return SCALE * (c1 * f1 + c2 * g1), c1 * f2 + c2 * g2


def evaluate(x1: float, x2: float) -> Evaluated:
    """Both losses and the gradient of each, in float64; a ``max`` whose arguments are equal passes the gradient."""
    t = math.tanh(x2)
    slope = 1 - t * t
    half = math.tanh(x2 / 2)
    bend = (1 - half * half) / 2
    c1, dc1 = (half, bend) if half >= 0 else (0.0, 0.0)
    c2, dc2 = (-half, -bend) if half <= 0 else (0.0, 0.0)
    bowl = 0.01 * (x2 + 8) ** 2 - 20
    losses, gradients = [], []
    for scale, inner, inner_slope, center in (
        (SCALE, -0.5 * x1 - 3.5 + t, slope, 7.0),
        (1.0, -0.5 * x1 + 3.5 - t, -slope, -7.0),
    ):
        f = math.log(max(abs(inner), FLOOR)) + 6
        inverse = 1 / inner if abs(inner) >= FLOOR else 0.0
        g = (x1 - center) ** 2 / 10 + bowl
        losses.append(scale * (c1 * f + c2 * g))
        d1 = c1 * -0.5 * inverse + c2 * (x1 - center) / 5
        d2 = dc1 * f + c1 * inner_slope * inverse + dc2 * g + c2 * 0.02 * (x2 + 8)
        gradients.append((scale * d1, scale * d2))
    return (losses[0], losses[1]), (gradients[0], gradients[1])


def front_x2(x1: float) -> float:
    """The front's x2 above x1: where opposite pulls along x1 cancel, what is left to descend is a function of x2.

    The tasks' weights (x1 + 7) / 14 and (7 - x1) / 14 (L_1 unscaled) leave tanh(-x2 / 2) ((49 - x1²) / 10 +
    (x2 + 8)² / 100 - 20).
    """
    depth = (49 - x1 * x1) / 10 - 20

    def slope(x2: float) -> float:
        half = math.tanh(-x2 / 2)
        return -(1 - half * half) / 2 * (depth + 0.01 * (x2 + 8) ** 2) + half * 0.02 * (x2 + 8)

    low, high = -9.0, -8.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def distance_to_front(x1: float, x2: float) -> float:
    """How far a point is from the front's point with the nearest x1 on it."""
    nearest = min(max(x1, FRONT_ENDS[0]), FRONT_ENDS[1])
    return math.hypot(x1 - nearest, x2 - front_x2(nearest))


class Point(nn.Module):
    """A trunk that is a point of the plane, whatever the input."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.theta.expand(len(inputs), 2)


def toy_module(start: tuple[float, float], optimizer: Callable[[Any], torch.optim.Optimizer]) -> MultiTaskModule:
    """The toy as a module for the Trainer: heads without parameters, losses that look at the point alone."""

    def loss_of(position: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda prediction, target: toy_losses(prediction)[position].mean()

    tasks = {task: Task(loss_of(position)) for position, task in enumerate(TASKS)}
    return MultiTaskModule(Point(start), {task: nn.Identity() for task in TASKS}, tasks, optimizer=optimizer)
