"""Trains modules without a trunk on parameters sharded by FSDP2 as one of a pair, and whole in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mtl import BalancedModule, TaskOutput, Weighting
from lightning_mtl.monitors import GradientConflict
from lightning_mtl.weighting import DWA, MGDA, GradDrop, GradNorm, NashMTL, NTKWeighting, Rotating, UncertaintyWeighting
from tests.balanced import worker
from tests.balanced.models import mlp
from tests.training import loader, quiet_trainer


class Sharded(BalancedModule):
    """A derivative, values that only some samples have, and a part that one task reaches and some steps leave out.

    Its layers are sharded one by one, so that they are freed at different times of a backward pass.
    """

    evaluate_with_gradients = True

    def __init__(self, *, penalized: bool = False, **arguments: Any) -> None:
        adam = functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
        super().__init__(["slope", "value", "other"], optimizer=adam, **arguments)
        torch.manual_seed(5)
        self.net, self.own, self.detour = mlp(3, 5, 6, 1), nn.Linear(3, 1), nn.Linear(3, 3)
        self.penalized = penalized

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[2], self.net[4], self.own, self.detour):
                fully_shard(part, mesh=mesh)

    def penalties(self) -> dict[str, Tensor]:
        return {"size": self.own.weight.square().sum()} if self.penalized else {}

    def task_losses(self, batch: Any) -> Mapping[str, TaskOutput]:
        x, y, step = batch
        x = x.clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        residual = slope.sum(1) - torch.sin(u[:, 0])
        labeled = ~y[:, 0].isnan()
        found = {"slope": TaskOutput(residual.square().mean(), num_samples=len(x), residuals=residual)}
        if labeled.any():
            given = self.own(self.detour(x)) if step % 3 == 2 else self.own(x)
            wrong = (u - y)[labeled] + given[labeled]
            found["value"] = TaskOutput(wrong.square().mean(), num_samples=int(labeled.sum()), residuals=wrong)
        if step % 2 == 0:
            found["other"] = TaskOutput((u - 1).square().mean(), num_samples=len(x), residuals=u - 1)
        return found


class Said(Sharded):
    """Says what is shared."""

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())


# The weighting, the module's arguments.
CASES: dict[str, tuple[Callable[[], Weighting | None], dict[str, Any]]] = {
    "MGDA": (MGDA, {}),
    "equal weights": (lambda: None, {}),
    "losses": (UncertaintyWeighting, {"gradient_clip_val": 0.5}),
    "heads not weighed": (lambda: GradNorm(at="trunk"), {}),
    "said, accumulated": (NashMTL, {"accumulate_grad_batches": 2}),
    "penalty": (MGDA, {"penalized": True}),
    "losses, accumulated": (UncertaintyWeighting, {"accumulate_grad_batches": 2}),
    "accumulated and clipped": (MGDA, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "kept weights": (lambda: MGDA(every_n_steps=3), {"penalized": True}),
    "importance": (lambda: DWA(importance={"value": 3.0}), {}),
    "rows": (GradDrop, {}),
    "named modules": (lambda: MGDA(at=["net.2"]), {}),
    "rotating": (lambda: Rotating(NashMTL()), {}),
    "kernels": (NTKWeighting, {}),
}


def batches(rank: int, ranks: int) -> list[tuple[Tensor, Tensor, int]]:
    """The other worker's samples, and the step's number."""
    return [(x, y, step) for step, (x, y) in enumerate(worker.batches(rank, ranks))]


def trainer_of(ranks: int, strategy: str, **arguments: Any) -> pl.Trainer:
    if ranks > 1:
        sizes: dict[str, Any] = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
        arguments["strategy"] = (
            ModelParallelStrategy(process_group_backend="gloo", **sizes) if strategy == "fsdp2" else strategy
        )
    return quiet_trainer(devices=ranks, use_distributed_sampler=False, num_sanity_val_steps=1, **arguments)


def train(
    name: str,
    automatic: bool = False,
    saves: Path | None = None,
    resumes: Path | None = None,
    strategy: str = "fsdp2",
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Any]:
    """Train one case; the parameters are given back whole."""
    make, arguments = CASES[name]
    renamed = {"accumulate_grad_batches", "gradient_clip_val"} if automatic else set()
    trainers = {key: value for key, value in arguments.items() if key in renamed}
    arguments = {key: value for key, value in arguments.items() if key not in renamed}
    module, weighting = (Said if name.startswith("said") else Sharded)(**arguments).double(), make()
    module.automatic_optimization = automatic
    callbacks: list[Any] = [] if weighting is None else [weighting]
    if name == "MGDA":
        callbacks += [monitor := GradientConflict(every_n_steps=1)]
    trainer = trainer_of(ranks, strategy, callbacks=callbacks, max_epochs=2 if saves is None else 1, **trainers)
    given = loader(*batches(rank, ranks))
    trainer.fit(module, given, given, ckpt_path=resumes)
    if saves is not None:
        trainer.save_checkpoint(saves)
    assert name != "MGDA" or not monitor.off
    states = module.state_dict()
    return {
        "parameters": {
            key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in states.items()
        },
        "state": {} if weighting is None else weighting.state_dict()["state"],
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("loss")},
        "known": None if module.sharing is None else module.sharing.state(module, list(module.tasks)),
    }


def evaluate(rank: int = 0, ranks: int = 1) -> list[Any]:
    """Validate a module that was never trained."""
    return trainer_of(ranks, "fsdp2").validate(Sharded().double(), loader(*batches(rank, ranks)), verbose=False)
