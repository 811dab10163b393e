"""Trains with per-task learning rates, in one process or as one of a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mtl import MultiTaskModule
from lightning_mtl.learning_rates import GradientNorm, Importance, Relatedness, TaskLearningRate
from lightning_mtl.training.checks import FSDP2_ON_CPU
from lightning_mtl.weighting import MGDA
from tests.small import Batch, batch, binary
from tests.training import loader

TASKS = ("a", "b", "c")


class Counted(MultiTaskModule):
    """Ranks count by their samples."""

    def task_losses(self, batch: Batch) -> Any:
        outputs: Any = super().task_losses(batch)
        for output in outputs.values():
            output.num_samples = len(output.target)
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(0.2), momentum=0.5)


class Sharded(Counted):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for part in (*self.heads.values(), self.trunk):
            fully_shard(part, mesh=mesh)


def combined() -> TaskLearningRate:
    return TaskLearningRate([Importance(metric="accuracy"), GradientNorm(decay=0.5)], bounds=(0.2, 5.0))


CASES: dict[str, tuple[Callable[[], TaskLearningRate], dict[str, Any]]] = {
    "accumulated": (combined, {"accumulate": 2}),
    "automatic": (combined, {"automatic": True}),
    "cosines": (
        lambda: TaskLearningRate([Relatedness("gradient_cosine"), GradientNorm(of="shared")], shares_trunk=True),
        {"callbacks": [MGDA]},
    ),
    "targets": (lambda: TaskLearningRate(Relatedness("target_correlation", samples=30)), {}),
    "predictions": (lambda: TaskLearningRate(Relatedness("prediction_mutual_information", samples=1000)), {}),
    "sharded": (lambda: TaskLearningRate(GradientNorm(decay=0.5), shares_trunk=True), {"sharded": True}),
}
if not FSDP2_ON_CPU:
    del CASES["sharded"]


def whole_batches() -> list[Batch]:
    """Some tasks are missing from some batches; ranks get unequal parts of the last."""
    drawn = [batch(8, seed, TASKS) for seed in range(3)] + [batch(5, 9, TASKS)]
    drawn[2][1].pop("b")
    return drawn


def part(whole: Batch, rank: int, ranks: int) -> Batch:
    if ranks == 1:
        return whole
    cut = slice(0, len(whole[0]) // 2) if rank == 0 else slice(len(whole[0]) // 2, None)
    return whole[0][cut], {task: target[cut] for task, target in whole[1].items()}


def train(name: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train one case, in one process or as one of a pair."""
    make, settings = CASES[name]
    data = [part(whole, rank, ranks) for whole in whole_batches()]
    strategy: Any = "auto"
    sharded = settings.get("sharded", False) and ranks > 1
    if sharded:
        strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo")
    elif ranks > 1:
        strategy = DDPStrategy(process_group_backend="gloo")
    cls = Sharded if sharded else Counted
    module = binary(cls=cls, tasks=TASKS, accumulate_grad_batches=settings.get("accumulate", 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)  # so that the first predictions are of both classes
    module.automatic_optimization = settings.get("automatic", False)
    rates = make()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=2,
        callbacks=[rates, *(kind() for kind in settings.get("callbacks", []))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(*data), loader(*data))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return {
        "parameters": torch.cat([p.detach().flatten() for p in whole]),
        "multipliers": rates.multipliers,
        "similarity": [factor.similarity for factor in rates.factors if isinstance(factor, Relatedness)],
    }
