"""Trains a model whose parts are used now and then, or whose penalties come and go, as one process or one of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradNorm, NashMTL, UncertaintyWeighting
from tests.distributed.table import FLAVOURS
from tests.training import loader, quiet_trainer

STEPS, SAMPLES = 12, 8
WEIGHTINGS: dict[str, Callable[[], list[Weighting]]] = {
    "equal": list,
    "losses": lambda: [UncertaintyWeighting()],
    "features": lambda: [MGDA(at="features")],
    "trunk": lambda: [MGDA()],
}
NOW_AND_THEN: dict[str, Callable[[], list[Weighting]]] = {
    "trunk, every second": lambda: [NashMTL(every_n_steps=2)],
    "features, every second": lambda: [MGDA(at="features", every_n_steps=2)],
    "trunk, later": lambda: [MGDA(start_step=3)],
    "last layer, every second": lambda: [GradNorm(every_n_steps=2)],
}
AdamW = functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)


class Routing(nn.Module):
    """A layer that nothing reads, and two branches, of which a batch takes the one that its first column names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(4, 6), nn.Linear(2, 2)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.branches[int(x[0, 0] > 0)](torch.tanh(self.first(x))))
        return result


class Penalized(MultiTaskModule):
    """Has a penalty of a parameter that no loss reaches: on one rank alone, or half of it in one process.

    Args:
        share: How much of the penalty this process has.
        every: In one step of how many.
    """

    def __init__(self, share: float, every: int, **arguments: Any) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), **arguments)
        self.share, self.every, self.scale = share, every, nn.Parameter(torch.ones(3))

    def penalties(self) -> dict[str, Tensor]:
        if self.share and self.trainer.global_step % self.every == 0:
            return {"scale": self.share * self.scale.square().sum(), "trunk": self.share * self.trunk[0].weight.norm()}  # type: ignore[index]
        return {}


def parts() -> dict[str, Any]:
    return {
        "heads": {task: nn.Linear(6, 1) for task in "ab"},
        "tasks": {task: Task(mse_loss, missing=torch.nan) for task in "ab"},
        "optimizer": AdamW,
    }


def batches(rank: int, ranks: int, *, unlabeled: bool) -> list[Any]:
    """This rank's samples; the other rank alone has labels of b in a third of the batches, and none has any in some."""
    generator, given = torch.Generator().manual_seed(3), []
    for step in range(STEPS):
        x = torch.randn(SAMPLES, 4, generator=generator)
        x[:, 0] = (-1) ** (step // 3 if unlabeled else step)
        y = {task: torch.randn(SAMPLES, 1, generator=generator) for task in "ab"}
        if step % 3 == 1:
            y["b"][: SAMPLES // 2] = torch.nan
        if unlabeled and step in (5, 6, 7):
            y = {task: torch.full_like(target, torch.nan) for task, target in y.items()}
        mine = slice(rank * SAMPLES // ranks, (rank + 1) * SAMPLES // ranks)
        given.append((x[mine], {task: target[mine] for task, target in y.items()}))
    return given


def fit(module: MultiTaskModule, name: str, strategy: str, given: list[Any], ranks: int) -> list[Tensor]:
    arguments = {"strategy": FLAVOURS[strategy](), "devices": ranks} if ranks > 1 else {}
    quiet_trainer(callbacks=(WEIGHTINGS | NOW_AND_THEN)[name](), use_distributed_sampler=False, **arguments).fit(
        module, loader(*given)
    )
    return [parameter.detach().clone() for parameter in module.parameters()]


def route(name: str, strategy: str, accumulate: int, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The parameters of a routing model at the end."""
    torch.manual_seed(0)
    module = MultiTaskModule(Routing(), accumulate_grad_batches=accumulate, **parts()).double()
    given = batches(rank, ranks, unlabeled=False)
    return fit(module, name, strategy, [_double(one) for one in given], ranks)


def penalize(name: str, strategy: str, every: int, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The parameters of a penalized model at the end."""
    torch.manual_seed(0)
    module = Penalized((0.5 if ranks == 1 else 1.0) * (rank == 0), every, **parts()).double()
    given = batches(rank, ranks, unlabeled=True)
    return fit(module, name, strategy, [_double(one) for one in given], ranks)


def _double(batch: Any) -> Any:
    x, y = batch
    return x.double(), {task: target.double() for task, target in y.items()}


def now_and_then(name: str, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The parameters of a model with a static graph, measured now and then; b is absent from the first step."""
    torch.manual_seed(0)
    module = MultiTaskModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), **parts()).double()
    given = [_double(one) for one in batches(rank, ranks, unlabeled=False)]
    for _, y in given[::3]:
        y["b"] = torch.full_like(y["b"], torch.nan)
    return fit(module, name, "static_graph", given, ranks)
