"""A module without a trunk whose losses differentiate it, for ``step_time.py``: u_t = u_xx, with its boundary."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.step_cases import LEARNING_RATE, Case
from lightning_mtl import BalancedModule


def physics_net() -> nn.Sequential:
    torch.manual_seed(0)
    pairs = itertools.pairwise([2, 64, 64, 64, 1])
    return nn.Sequential(*[layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())][:-1])


def physics_losses(net: nn.Module, points: Tensor) -> dict[str, Tensor]:
    inside, edge, start = points.clone().requires_grad_(), points.clone(), points.clone()
    edge[:, 0], start[:, 1] = edge[:, 0].round(), 0
    u = net(inside)
    (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)
    return {
        "residual": (first[:, 1] - second[:, 0]).square().mean(),
        "boundary": net(edge).square().mean(),
        "initial": (net(start)[:, 0] - torch.sin(3 * start[:, 0])).square().mean(),
    }


class PlainPhysics(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = physics_net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack(list(physics_losses(self.net, batch).values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


class Physics(BalancedModule):
    def __init__(self) -> None:
        super().__init__(
            ["residual", "boundary", "initial"],
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LEARNING_RATE),
        )
        self.net = physics_net()

    def task_losses(self, batch: Tensor) -> dict[str, Tensor]:
        return physics_losses(self.net, batch)


@dataclass
class PhysicsCase(Case):
    """The same turns for a physics-informed network, on a batch of so many points."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.batch = torch.rand(self.batch_size or 256, 2).to(self.device)
        self._modules = {}

    def module(self, *, plain: bool = False, metrics: bool = False) -> pl.LightningModule:
        return PlainPhysics() if plain else Physics()
