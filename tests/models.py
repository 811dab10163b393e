"""Random multi-task models of every shape that the engine must follow, with a batch each, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mtl import MultiTaskModule, Task

WIDTH, INPUTS, OUTPUTS, SAMPLES = 5, 4, 2, 3


@dataclass
class Case:
    """A module and a batch for it."""

    module: MultiTaskModule
    batch: Any

    @property
    def tasks(self) -> list[str]:
        return list(self.module.tasks)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclass
class Features:
    low: Tensor
    high: Tensor


def tensors_in(features: Any) -> list[Tensor]:
    """All tensors of a nested structure, in order."""
    if isinstance(features, Tensor):
        return [features]
    if isinstance(features, Features):
        return [features.low, features.high]
    values = features.values() if isinstance(features, Mapping) else features
    return [tensor for value in values for tensor in tensors_in(value)]


class Stem(nn.Module):
    """Two layers whose outputs are arranged by ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        # The layer that runs last is defined first.
        self.second = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(INPUTS, WIDTH)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        low = torch.tanh(self.first(x))
        return self.wrap(x, low, torch.tanh(self.second(low)))


class Reader(nn.Module):
    """A head that reads some of the features' tensors, all of them by default."""

    def __init__(self, widths: Sequence[int], picks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.picks = range(len(widths)) if picks is None else picks
        self.layer = nn.Linear(sum(widths[i] for i in self.picks), OUTPUTS)

    def forward(self, features: Any) -> Tensor:
        found = tensors_in(features)
        result: Tensor = self.layer(torch.cat([found[i].flatten(1) for i in self.picks], dim=1))
        return result


class TiedHead(nn.Module):
    """A head that uses a parameter of the trunk beside its own."""

    def __init__(self, tied: nn.Parameter) -> None:
        super().__init__()
        self.own = nn.Linear(INPUTS, OUTPUTS)
        self.tied = tied

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.own(F.linear(z, self.tied.t()))
        return result


class Partial(nn.Module):
    """A trunk with a frozen first layer and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.second = (nn.Linear(a, WIDTH) for a in (INPUTS, WIDTH, WIDTH))
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class PartialHead(nn.Module):
    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, OUTPUTS), nn.Linear(1, 1)
        if frozen:
            self.used.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.used(z)
        return result


class Branches(nn.Module):
    """A trunk with a common stem and a branch a task, ``{task: features}``; the branches are shared by no two tasks."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, WIDTH)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in tasks)
        self.tasks = list(tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.stem(x))
        return {task: torch.tanh(branch(z)) for task, branch in zip(self.tasks, self.branches, strict=True)}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return result


class Named(nn.Module):
    """A trunk that takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, WIDTH)

    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * scale


class Penalized(MultiTaskModule):
    """Penalties on the trunk, on the features, on a head and on nothing that can be trained."""

    features: Tensor

    def task_losses(self, batch: Any) -> Any:
        inputs, targets = batch
        self.features = self.trunk(inputs)
        return {k: self.tasks[k].loss(self.heads[k](self.features), y) for k, y in targets.items()}

    def penalties(self) -> dict[str, Tensor]:
        first_head = next(iter(self.heads.values()))
        return {
            "trunk": torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum(),
            "features": self.features.square().mean(),
            "head": torch.stack([p.square().sum() for p in first_head.parameters()]).sum(),
        }


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def _scaled_mse(scale: float, prediction: Tensor, target: Tensor) -> Tensor:
    return scale * F.mse_loss(prediction, target)


def _loss_of_shape_one(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target).reshape(1)


WRAPS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], list[int]]] = {
    "dict": (lambda _x, low, high: {"low": low, "deep": {"high": high}}, [WIDTH, WIDTH]),
    "tuple": (lambda _x, low, high: (low, [high]), [WIDTH, WIDTH]),
    "named tuple": (lambda _x, low, high: Pair(low, high), [WIDTH, WIDTH]),
    "dataclass": (lambda _x, low, high: Features(low, high), [WIDTH, WIDTH]),
    # The input needs no gradient; the same tensor comes twice.
    "pass through": (lambda x, _low, high: (x, high, high), [INPUTS, WIDTH, WIDTH]),
}
KINDS = (
    "mlp",
    "conv",
    "batch norm",
    *WRAPS,
    "disjoint outputs",
    "decoder",
    "per task",
    "tied",
    "partial",
    "checkpointed",
    "keywords",
    "loaders",
    "shape one",
    "penalized",
)


def _trunk_and_heads(kind: str, tasks: Sequence[str]) -> tuple[nn.Module, dict[str, nn.Module]]:
    trunk: nn.Module = _mlp()
    heads: dict[str, nn.Module] = {task: nn.Linear(WIDTH, OUTPUTS) for task in tasks}
    if kind == "conv":
        trunk = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten())
        heads = {task: nn.Linear(8, OUTPUTS) for task in tasks}
    elif kind == "batch norm":
        trunk = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
    elif kind in WRAPS:
        wrap, widths = WRAPS[kind]
        trunk, heads = Stem(wrap), {task: Reader(widths) for task in tasks}
    elif kind == "disjoint outputs":
        wrap, widths = WRAPS["tuple"]
        trunk = Stem(wrap)
        heads = {task: Reader(widths, [position % 2]) for position, task in enumerate(tasks)}
    elif kind == "decoder":
        decoder = nn.Linear(WIDTH, WIDTH)
        for task in tasks[:2]:
            heads[task] = nn.Sequential(decoder, nn.Tanh(), nn.Linear(WIDTH, OUTPUTS))
    elif kind == "per task":
        trunk = Branches(tasks)
    elif kind == "tied":
        first = trunk.get_submodule("0").weight
        assert isinstance(first, nn.Parameter)
        heads = {task: TiedHead(first) for task in tasks}
    elif kind == "partial":
        trunk = Partial()
        heads = {task: PartialHead(frozen=position == 0) for position, task in enumerate(tasks)}
    elif kind == "checkpointed":
        trunk = Checkpointed()
    elif kind == "keywords":
        trunk = Named()
    return trunk, heads


def _inputs(kind: str) -> Any:
    if kind == "conv":
        return torch.randn(SAMPLES, 1, 4, 4, dtype=torch.float64)
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64)
    return {"x": x, "scale": torch.rand(SAMPLES, 1, dtype=torch.float64)} if kind == "keywords" else x


def build(kind: str, num_tasks: int, seed: int, **arguments: Any) -> Case:
    """A random model of one kind; its optimizer is plain descent with step size 1, so that changes are gradients."""
    torch.manual_seed(seed)
    tasks = [f"task{k}" for k in range(num_tasks)]
    trunk, heads = _trunk_and_heads(kind, tasks)
    scales = (10.0 ** (2 * torch.rand(num_tasks) - 1)).tolist()
    losses = {k: functools.partial(_scaled_mse, scale) for k, scale in zip(tasks, scales, strict=True)}
    cls = Penalized if kind == "penalized" else MultiTaskModule
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)}
    module = cls(
        trunk,
        heads,
        {task: Task(_loss_of_shape_one if kind == "shape one" else losses[task]) for task in tasks},
        **(settings | arguments),
    ).double()
    targets = {task: torch.randn(SAMPLES, OUTPUTS, dtype=torch.float64) for task in tasks}
    if kind == "loaders":
        return Case(module, {task: (_inputs(kind), target) for task, target in targets.items()})
    return Case(module, (_inputs(kind), targets))
