"""Two equations for physics.py: their residuals at random points, and reference solutions to compare with."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.fft import dstn, idstn
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_mtl import BalancedModule, Task, TaskOutput

Points = dict[str, Tensor]
"""For each task, where its residual is taken, ``[N, 2]``."""


def derivative(values: Tensor, points: Tensor) -> Tensor:
    """The derivative of each value by its own point, ``[N, 2]``, with a graph of its own."""
    (found,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return found


class Equation(ABC):
    """A differential equation on a square, with conditions on parts of its edge."""

    tasks: ClassVar[tuple[str, ...]]
    axes: ClassVar[tuple[str, str]]
    sizes: ClassVar[Mapping[str, int]]
    """How many points a batch has for each task."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Points:
        """Draw a batch of points."""

    @abstractmethod
    def residuals(self, net: nn.Module, points: Points) -> dict[str, Tensor]:
        """What is 0 for a solution, for each task, ``[N]``."""

    @abstractmethod
    def reference(self) -> tuple[Tensor, Tensor]:
        """A grid of points, ``[m, n, 2]``, and the solution at them, ``[m, n]``."""


class Helmholtz(Equation):
    r"""The Helmholtz equation :math:`u_{xx} + u_{yy} + k^2 u = q` on [-1, 1]², with u = 0 on the edge and k = 1.

    The source is the one of Wang, Teng and Perdikaris (2021) with a factor of its own in the second sine:
    :math:`q = (k^2 - \pi^2 (a^2 + b^2)) \sin(a \pi x) \sin(b \pi y)`.
    """

    tasks = ("residual", "boundary")
    axes = ("x", "y")
    sizes: ClassVar = {"residual": 128, "boundary": 64}

    def __init__(self, k: float = 1.0, waves: tuple[int, int] = (1, 2)) -> None:
        self.k, self.waves = k, waves

    def source(self, points: Tensor) -> Tensor:
        """The right side, q."""
        a, b = (math.pi * number for number in self.waves)
        found: Tensor = (self.k**2 - a**2 - b**2) * torch.sin(a * points[..., 0]) * torch.sin(b * points[..., 1])
        return found

    def draw(self, generator: torch.Generator) -> Points:
        inside = 2 * torch.rand(self.sizes["residual"], 2, generator=generator) - 1
        edge = 2 * torch.rand(self.sizes["boundary"], 2, generator=generator) - 1
        fixed = torch.arange(len(edge))  # one coordinate of each is -1 or 1
        edge[fixed, fixed % 2] = (2 * (fixed // 2 % 2) - 1).float()
        return {"residual": inside, "boundary": edge}

    def residuals(self, net: nn.Module, points: Points) -> dict[str, Tensor]:
        inside = points["residual"].requires_grad_()
        u = net(inside)[:, 0]
        first = derivative(u, inside)
        laplacian = derivative(first[:, 0], inside)[:, 0] + derivative(first[:, 1], inside)[:, 1]
        residual = laplacian + self.k**2 * u - self.source(points["residual"].detach())
        return {"residual": residual, "boundary": net(points["boundary"])[:, 0]}

    def reference(self, size: int = 63) -> tuple[Tensor, Tensor]:
        """Solve in sines, in which the equation is diagonal: exact to rounding for a source of few waves."""
        x = torch.linspace(-1, 1, size + 2, dtype=torch.float64)[1:-1]
        grid = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
        squares = (np.arange(1, size + 1) * math.pi / 2) ** 2
        coefficients = dstn(self.source(grid).numpy(), type=1) / (self.k**2 - squares[:, None] - squares)
        return grid.float(), torch.from_numpy(idstn(coefficients, type=1)).float()


class Burgers(Equation):
    r"""Burgers' equation :math:`u_t + u u_x = \nu u_{xx}` with u(x, 0) = -sin πx and u(±1, t) = 0.

    x is in [-1, 1], t in [0, 1]. The smaller ν, the steeper the front that forms at x = 0; 0.01 / π is usual, and takes
    longer trainings than here.
    """

    tasks = ("residual", "boundary", "initial")
    axes = ("x", "t")
    sizes: ClassVar = {"residual": 128, "boundary": 32, "initial": 64}

    def __init__(self, nu: float = 0.1 / math.pi) -> None:
        self.nu = nu

    def draw(self, generator: torch.Generator) -> Points:
        points = {task: torch.rand(number, 2, generator=generator) for task, number in self.sizes.items()}
        for one in points.values():
            one[:, 0] = 2 * one[:, 0] - 1
        points["boundary"][:, 0] = points["boundary"][:, 0].sign()
        points["initial"][:, 1] = 0
        return points

    def residuals(self, net: nn.Module, points: Points) -> dict[str, Tensor]:
        inside = points["residual"].requires_grad_()
        u = net(inside)[:, 0]
        first = derivative(u, inside)
        second = derivative(first[:, 0], inside)[:, 0]
        start = points["initial"]
        return {
            "residual": first[:, 1] + u * first[:, 0] - self.nu * second,
            "boundary": net(points["boundary"])[:, 0],
            "initial": net(start)[:, 0] + torch.sin(math.pi * start[:, 0]),
        }

    def reference(self, sizes: tuple[int, int] = (101, 41), quadrature: int = 120) -> tuple[Tensor, Tensor]:
        """Compute the Cole-Hopf formula by Gauss-Hermite quadrature."""
        x, t = np.linspace(-1, 1, sizes[0]), np.linspace(0, 1, sizes[1])
        nodes, weights = np.polynomial.hermite.hermgauss(quadrature)
        # u is the mean of -sin πy over y = x - z with the weight exp(-cos(πy) / 2πν) exp(-z² / 4νt).
        y = x[:, None, None] - np.sqrt(4 * self.nu * t)[:, None] * nodes
        exponents = -np.cos(math.pi * y) / (2 * math.pi * self.nu)
        masses = weights * np.exp(exponents - exponents.max(-1, keepdims=True))
        u = -(np.sin(math.pi * y) * masses).sum(-1) / masses.sum(-1)
        grid = np.stack(np.meshgrid(x, t, indexing="ij"), -1)
        return torch.from_numpy(grid).float(), torch.from_numpy(u).float()


EQUATIONS: dict[str, type[Equation]] = {"helmholtz": Helmholtz, "burgers": Burgers}


class Batches(IterableDataset[Points]):
    """Fresh points in each step, the same ones for the same seed."""

    def __init__(self, equation: Equation, steps: int, seed: int) -> None:
        self.equation, self.steps, self.seed = equation, steps, seed

    def __iter__(self) -> Iterator[Points]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield self.equation.draw(generator)


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of all tasks."""
    return (prediction - target).square().mean()


class PhysicsInformed(BalancedModule):
    """A network whose losses say how far it is from solving an equation.

    Args:
        equation: The equation.
        steps: The length of the training, over which the learning rate falls to a hundredth.
        lr: Where it begins.
        scales: ``{task: factor}`` before the losses.
        loss_scale: What the losses are divided by, as in :class:`~lightning_mtl.Task`.
    """

    def __init__(
        self,
        equation: Equation,
        steps: int,
        *,
        lr: float = 5e-3,
        scales: Mapping[str, float] | None = None,
        loss_scale: Any = None,  # noqa: ANN401 - Task says what it may be
    ) -> None:
        super().__init__({task: Task(mean_square, loss_scale=loss_scale) for task in equation.tasks})
        widths = itertools.pairwise([2, 40, 40, 40, 1])
        self.net = nn.Sequential(*[layer for pair in widths for layer in (nn.Linear(*pair), nn.Tanh())][:-1])
        self.equation, self.steps, self.lr, self.scales = equation, steps, lr, dict(scales or {})

    def task_losses(self, batch: Points) -> dict[str, TaskOutput]:
        """Each loss is the mean square of its residuals, which NTKWeighting differentiates."""
        outputs = {}
        for task, residual in self.equation.residuals(self.net, batch).items():
            scaled = self.scales.get(task, 1.0) ** 0.5 * residual
            outputs[task] = TaskOutput(scaled.square().mean(), residuals=scaled)
        return outputs

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's dictionary
        """Adam, with a learning rate that falls in every step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @functools.cached_property
    def solution(self) -> tuple[Tensor, Tensor]:
        """The reference solution on its grid."""
        return self.equation.reference()

    @torch.no_grad()
    def error(self) -> float:
        r"""The relative error :math:`\lVert u - u^* \rVert / \lVert u^* \rVert` over the reference's grid."""
        grid, expected = self.solution
        return float((self.net(grid)[..., 0] - expected).norm() / expected.norm())
