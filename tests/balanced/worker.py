"""Trains a module without a trunk as one process or one of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl import BalancedModule, TaskOutput, Weighting
from tests.balanced.models import mlp
from tests.contract_rows import METHODS as EVERY_METHOD
from tests.training import flat_parameters, loader, quiet_trainer

STEPS, SAMPLES = 6, 8
WEIGHTINGS = ("MGDA", "UncertaintyWeighting")


def _for_any_module(make: Callable[..., Weighting]) -> Callable[[], Weighting]:
    """The same method, measuring where a module without a trunk can be measured."""
    return functools.partial(make, at="trunk") if make().at in ("features", "last_layer") else make


# DTP reads a metric, which these modules have not.
METHODS = {name: _for_any_module(make) for name, make in EVERY_METHOD.items() if name != "DTP"}


class Flow(BalancedModule):
    """A derivative as one loss, values as another; samples without a value have none of the second."""

    def __init__(self, accumulate: int) -> None:
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        super().__init__(["slope", "value"], optimizer=sgd, accumulate_grad_batches=accumulate)
        self.net, self.scale = mlp(3, 6, 1), nn.Parameter(torch.ones(1))

    def task_losses(self, batch: Any) -> Mapping[str, TaskOutput]:
        x, y = batch
        x = x.clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        labeled = ~y.isnan()
        found = {"slope": TaskOutput((slope - 1).square().mean(), num_samples=len(x))}
        if labeled.any():
            wrong = (self.scale * u[labeled] - y[labeled]).square().mean()
            found["value"] = TaskOutput(wrong, num_samples=int(labeled.sum()))
        return found


def batches(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's samples; in some steps the other rank alone has values, and in the first steps nobody."""
    generator, given = torch.Generator().manual_seed(3), []
    for step in range(STEPS):
        x = torch.randn(SAMPLES, 3, dtype=torch.float64, generator=generator)
        y = torch.randn(SAMPLES, 1, dtype=torch.float64, generator=generator)
        y[SAMPLES // 2 :] = torch.nan if step % 3 == 1 else y[SAMPLES // 2 :]
        y = torch.full_like(y, torch.nan) if step == 0 else y
        given.append((x.chunk(ranks)[rank], y.chunk(ranks)[rank]))
    return given


def train(name: str, accumulate: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Any]:
    """The parameters after a few steps, and what is known to be shared."""
    torch.manual_seed(5)
    module = Flow(accumulate).double()
    trainer = quiet_trainer(
        callbacks=[METHODS[name]()],
        precision=64,
        use_distributed_sampler=False,
        **({"devices": ranks, "strategy": "ddp_find_unused_parameters_true"} if ranks > 1 else {}),
    )
    trainer.fit(module, loader(*batches(rank, ranks)))
    assert module.sharing is not None
    return flat_parameters(module), module.sharing.state(module, list(module.tasks))
