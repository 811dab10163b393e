"""Modules of several losses that are no trunk with heads, in float64, with a batch each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mtl import BalancedModule

SGD = functools.partial(torch.optim.SGD, lr=1.0)
"""A change of a parameter is its gradient."""


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Physics(BalancedModule):
    """u_t = u_xx with boundary and initial values: a residual of second order."""

    def __init__(self, width: int = 6, **arguments: Any) -> None:
        super().__init__(["residual", "boundary", "initial"], optimizer=SGD, **arguments)
        self.net = mlp(2, width, width, 1)

    def forward(self, points: Tensor) -> Tensor:
        result: Tensor = self.net(points)
        return result

    def residual(self, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        u = self(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(du[:, 0].sum(), points, create_graph=True)
        return (du[:, 1] - second[:, 0]).square().mean()

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        edge = batch.clone()
        edge[:, 0] = edge[:, 0].round()
        start = torch.stack([batch[:, 0], torch.zeros_like(batch[:, 0])], 1)
        return {
            "residual": self.residual(batch.clone()),
            "boundary": self(edge).square().mean(),
            "initial": (self(start)[:, 0] - torch.sin(3 * batch[:, 0])).square().mean(),
        }


class Forces(BalancedModule):
    """Energies, and forces that are their derivative."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["energy", "forces"], optimizer=SGD, **arguments)
        self.potential = mlp(3, 5, 1)

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        positions = batch.clone().requires_grad_()
        energies = self.potential(positions)
        (slope,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        return {"energy": (energies - 1).square().mean(), "forces": (slope + positions.detach()).square().mean()}


class Decoder(BalancedModule):
    """Two encoders, a decoder in common, attributes by the names that a MultiTaskModule has for its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b"], optimizer=SGD, **arguments)
        self.trunk: Any = nn.ModuleDict({"left": mlp(3, 4), "right": mlp(3, 4)})
        self.heads: Any = mlp(4, 4, 2)

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        return {
            "a": self.heads(self.trunk["left"](batch)).square().mean(),
            "b": (self.heads(self.trunk["right"](batch)) - 1).square().mean(),
        }


class OneLayer(BalancedModule):
    """Two networks that have one layer in common, and a weight tied to its transpose."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b"], optimizer=SGD, **arguments)
        middle = nn.Linear(4, 4)
        self.first = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), middle, nn.Tanh(), nn.Linear(4, 1))
        self.second: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), middle, nn.Tanh(), nn.Linear(4, 1))

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        again = nn.functional.linear(self.first[:2](batch), self.second[2].weight.t())
        return {"a": self.first(batch).square().mean() + again.square().mean(), "b": self.second(batch).abs().mean()}


class Functional(BalancedModule):
    """Parameters without modules, one of them never used, and a module that is called with parameters of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b", "c"], optimizer=SGD, **arguments)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.unused = nn.Parameter(torch.ones(2))
        self.layer = nn.Linear(4, 2)

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        z = torch.tanh(nn.functional.linear(batch, self.weight))
        squared = {name: parameter.square() for name, parameter in self.layer.named_parameters()}
        return {
            "a": self.layer(z * self.scales[0]).square().mean(),
            "b": functional_call(self.layer, squared, (z * self.scales[1],)).square().mean(),
            "c": (z - 0.5).square().mean() + self.scales[0].square().sum(),
        }


class Levels(BalancedModule):
    """Losses taken at several depths of one list of modules, with an output layer each."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["low", "middle", "high"], optimizer=SGD, **arguments)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.outputs = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        losses, z = {}, batch
        for task, layer, output in zip(self.tasks, self.layers, self.outputs, strict=True):
            z = torch.tanh(layer(z))
            losses[task] = (output(z) - 1).square().mean()
        return losses


class Lazy(BalancedModule):
    """Parameters that get their shapes in the first step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["a", "b"], optimizer=SGD, **arguments)
        self.encoder = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
        self.a, self.b = nn.LazyLinear(1), nn.LazyLinear(2)

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        z = self.encoder(batch)
        return {"a": self.a(z).square().mean(), "b": (self.b(z) - 1).square().mean()}


class Variational(BalancedModule):
    """A term from inside the model, and a term of parameters alone."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(["reconstruction", "divergence", "sparsity"], optimizer=SGD, **arguments)
        self.encoder = mlp(3, 4, 4)
        self.decoder: Any = mlp(2, 4, 3)

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        mean, log = self.encoder(batch).chunk(2, 1)
        return {
            "reconstruction": (self.decoder(mean + torch.exp(log)) - batch).square().mean(),
            "divergence": (mean.square() + log.exp() - log - 1).mean(),
            "sparsity": self.decoder[0].weight.abs().sum(),
        }


MODELS: dict[str, Callable[..., BalancedModule]] = {
    cls.__name__: cls for cls in (Physics, Forces, Decoder, OneLayer, Functional, Levels, Lazy, Variational)
}


def made(name: str, **arguments: Any) -> BalancedModule:
    torch.manual_seed(1)
    return MODELS[name](**arguments).double()


def points(name: str, number: int = 5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 2 if name == "Physics" else 3, dtype=torch.float64, generator=generator)
