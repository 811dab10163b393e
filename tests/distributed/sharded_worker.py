"""Trains on parameters sharded by FSDP2 as one of a pair, and whole in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, mse_loss

from lightning_mtl import MultiTaskModule, Task, TaskOutput, Weighting
from lightning_mtl.weighting import MGDA, GradientNormBalance, GradNorm, NashMTL, UncertaintyWeighting
from tests.training import loader

STEPS, BATCH = 9, 8
HEADS = {"age": 1, "smile": 2, "pose": 3}
Part = tuple[int, list[int], Tensor, dict[str, Tensor]]

# Whether tasks are absent, the weighting, the module's arguments.
CASES: dict[str, tuple[bool, Callable[[], Weighting | None], dict[str, Any]]] = {
    "equal weights": (False, lambda: None, {}),
    "losses": (False, UncertaintyWeighting, {}),
    "features": (False, lambda: MGDA(at="features"), {}),
    "features, heads weighed": (False, lambda: GradNorm(at="features"), {}),
    "features, clipped": (False, lambda: MGDA(at="features"), {"gradient_clip_val": 0.5}),
    "losses, accumulated and clipped": (
        False,
        UncertaintyWeighting,
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    ),
    "trunk": (False, MGDA, {}),
    "trunk, heads weighed": (False, NashMTL, {}),
    "trunk, kept weights": (False, lambda: MGDA(every_n_steps=3), {}),
    "losses, absent tasks": (True, UncertaintyWeighting, {}),
    "features, absent tasks": (True, lambda: MGDA(at="features"), {}),
    "trunk, absent tasks": (True, GradientNormBalance, {}),
    "features, penalty": (False, lambda: MGDA(at="features"), {"penalized": True}),
    "trunk, penalty": (False, MGDA, {"penalized": True}),
}


class Shared(MultiTaskModule):
    """Shards the trunk's layers and each head, where the strategy asks for it."""

    def __init__(self, *, absent: bool, penalized: bool = False, **arguments: Any) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh()),
            {task: nn.Linear(12, width) for task, width in HEADS.items()},
            {task: Task(mse_loss if width == 1 else cross_entropy) for task, width in HEADS.items()},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.01),
            **arguments,
        )
        self.absent, self.penalized = absent, penalized
        self.activity = torch.zeros(())

    def penalties(self) -> dict[str, Tensor]:
        return {"activity": self.activity} if self.penalized else {}

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for part in (*self.heads.values(), self.trunk[0], self.trunk[2], self.trunk):  # type: ignore[index]
                fully_shard(part, mesh=mesh)

    def task_losses(self, batch: Part) -> dict[str, TaskOutput]:
        step, samples, inputs, targets = batch
        outputs = {}
        if self.penalized:  # of what the trunk returned
            features = self.trunk(inputs)
            predictions = {task: head(features) for task, head in self.heads.items()}
            self.activity = features.square().mean()
        else:
            predictions = self(inputs)
        for position, task in enumerate(HEADS):
            # Samples with labels lie on one rank in some steps, on both in others, on none in one of five.
            labeled = torch.tensor([(5 * i + 3 * step + 2 * position) % 4 < 1 + step % 3 for i in samples])
            if not self.absent:
                labeled[:] = True
            elif (step + position) % 5 == 0:
                labeled[:] = False
            if labeled.any():
                loss = self.tasks[task].loss(predictions[task][labeled], targets[task][labeled])
                outputs[task] = TaskOutput(loss, num_samples=int(labeled.sum()))
        return outputs


def parts(rank: int, ranks: int) -> list[Part]:
    """A rank's samples of each step's batch."""
    generator = torch.Generator().manual_seed(1)
    found: list[Part] = []
    for step in range(STEPS):
        inputs = torch.randn(BATCH, 6, generator=generator)
        targets = {
            task: torch.randn(BATCH, 1, generator=generator)
            if width == 1
            else torch.randint(width, (BATCH,), generator=generator)
            for task, width in HEADS.items()
        }
        mine = list(range(rank, BATCH, ranks))
        found.append((step, mine, inputs[mine], {task: target[mine] for task, target in targets.items()}))
    return found


def train(name: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train one case; the parameters are given back whole."""
    absent, make, arguments = CASES[name]
    module, weighting = Shared(absent=absent, **arguments), make()
    strategy: Strategy | str = "auto"
    if ranks > 1:
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=1,
        callbacks=[] if weighting is None else [weighting],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(*parts(rank, ranks)))
    whole = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in module.state_dict().items()
    }
    return {"parameters": whole, "state": {} if weighting is None else weighting.state_dict()["state"]}
