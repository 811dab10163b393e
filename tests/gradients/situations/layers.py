"""Ordinary layers with a state or random numbers, frozen parts, and inputs of several forms."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.gradients.situations.base import (
    SAMPLES,
    WIDTH,
    Loss,
    Net,
    Situation,
    classification,
    deep,
    linear,
    random_inputs,
    regression,
)


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))


def noisy_head() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))


def frozen_below() -> nn.Module:
    trunk = deep()
    trunk.get_submodule("0").requires_grad_(False)
    return trunk


def frozen_above() -> nn.Module:
    trunk = deep()
    trunk.get_submodule("2").requires_grad_(False)
    return trunk


def frozen_head() -> nn.Module:
    return nn.Linear(WIDTH, 1).requires_grad_(False)


class WithUnused(nn.Module):
    """A trunk with a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).tanh()
        return result


class UnusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(WIDTH, 1), nn.Linear(1, 1)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.layer(z)
        return result


class Branches(nn.Module):
    """A stem and a branch for each task, as the entries of a dict that each head gets its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.branches = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.stem(x).tanh()
        return {task: branch(z).tanh() for task, branch in self.branches.items()}


class Embedded(nn.Module):
    """Embeddings of positive inputs, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.table((x.abs() * 4).long().clamp(0, 7)).mean(1)).tanh()
        return result


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, WIDTH), nn.Linear(2, WIDTH)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        result: Tensor = (self.left(left) + self.right(right)).tanh()
        return result


class FromDict(TwoInputs):
    """Takes one argument, a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["left"], batch["right"])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x[:, None])))).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=4, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x[:, None] * torch.ones(1, 2, 1, dtype=x.dtype)).mean(1)
        return result


class ByForward(Net):
    """Predicts by the module's own forward, whatever the inputs' form."""

    def split(self, x: Tensor) -> Any:
        return x

    def losses(self, x: Tensor) -> Loss:
        found = self(self.split(x))
        return {"a": regression(found["a"], x), "b": classification(found["b"], x)}


class Positional(ByForward):
    def split(self, x: Tensor) -> Any:
        return x[:, :2], x[:, 2:]


class Keywords(ByForward):
    def split(self, x: Tensor) -> Any:
        return {"left": x[:, :2], "right": x[:, 2:]}


class CalledWithDict(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk({"left": x[:, :2], "right": x[:, 2:]})
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class Default(Net):
    """The library's own task_losses."""

    def task_losses(self, batch: Any) -> Any:
        found: Any = super(Net, self).task_losses(batch)
        return {task: output.loss for task, output in found.items()}


def joint(seed: int) -> Any:
    x = random_inputs(seed)
    return x, {"a": x[:, :1].clone(), "b": x[:, :3].clone()}


def own_inputs(seed: int) -> Any:
    x, other = random_inputs(seed), random_inputs(seed + 100)[:3]
    return {"a": (x, x[:, :1].clone()), "b": (other, other[:, :3].clone())}


class AbsentTask(Net):
    """Task a is absent."""

    def losses(self, x: Tensor) -> Loss:
        return {"b": super().losses(x)["b"]}


assert SAMPLES > 3, "the second task's own inputs are fewer"
# Inputs of each task's own have no features in common; the default task_losses says so.
APART = {"features": "own"}
LAYERS = (
    Situation("plain", Net, clean=True),
    Situation("module's own forward", ByForward, clean=True),
    Situation("default task_losses", Default, clean=True, inputs=joint),
    Situation("default task_losses, inputs of each task's own", Default, refused=APART, inputs=own_inputs),
    Situation("deep trunk", functools.partial(Net, trunk=deep), layer="trunk.2", clean=True),
    Situation("first layer measured", functools.partial(Net, trunk=deep), is_last=False, clean=True),
    Situation("batch norm", functools.partial(Net, trunk=batch_normed), clean=True),
    Situation("dropout", functools.partial(Net, trunk=dropping), layer="trunk.2", clean=True),
    Situation("batch norm and dropout in a head", functools.partial(Net, a=noisy_head), clean=True),
    Situation("first layer frozen", functools.partial(Net, trunk=frozen_below), layer="trunk.2", clean=True),
    Situation("last layer frozen", functools.partial(Net, trunk=frozen_above), clean=True),
    Situation("head frozen", functools.partial(Net, a=frozen_head), clean=True),
    Situation("unused layers", functools.partial(Net, trunk=WithUnused, a=UnusedHead), layer="trunk.layer", clean=True),
    Situation("branch for each task", functools.partial(ByForward, trunk=Branches), layer="trunk.branches", clean=True),
    Situation("embeddings", functools.partial(Net, trunk=Embedded), layer="trunk.layer", clean=True),
    Situation(
        "two inputs", functools.partial(Positional, trunk=TwoInputs), layer="trunk.right", is_last=False, clean=True
    ),
    Situation(
        "keyword inputs", functools.partial(Keywords, trunk=TwoInputs), layer="trunk.left", is_last=False, clean=True
    ),
    Situation(
        "dict inputs", functools.partial(CalledWithDict, trunk=FromDict), layer="trunk.left", is_last=False, clean=True
    ),
    Situation(
        "convolutions",
        functools.partial(Net, trunk=Convolutions, a=linear(1), b=linear(3)),
        layer="trunk.second",
        clean=True,
    ),
    Situation("attention", functools.partial(Net, trunk=Attention), layer="trunk.layer.linear2", clean=True),
    Situation("one task absent", AbsentTask, clean=True),
)
