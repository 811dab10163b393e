"""Stops tasks of partial labels in one process, or as one of a pair."""

from __future__ import annotations

from typing import Any

from lightning_mtl.control import TaskCheckpoint, TaskEarlyStopping
from tests.distributed.partial_worker import WEIGHTINGS, batches, module
from tests.distributed.table import FLAVOURS
from tests.training import flat_parameters, loader, quiet_trainer


def train(name: str, accumulate: int = 1, flavour: str = "default", rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train with one kind of weighting; of four tasks one is dropped, and one's head trains alone."""
    model = module(accumulate_grad_batches=accumulate)
    stopping = TaskEarlyStopping(
        {"columns": "error", "masked": "loss", "classes": "accuracy"},
        patience={"columns": 1, "masked": 1, "classes": 100},
        min_delta=1e6,
        then={"masked": "head_only"},
    )
    trainer = quiet_trainer(
        devices=ranks,
        strategy="auto" if ranks == 1 else FLAVOURS[flavour](),
        callbacks=[*WEIGHTINGS[name](), stopping],
        use_distributed_sampler=False,
        max_epochs=4,
    )
    trainer.fit(model, loader(*batches(rank, ranks)), loader(*batches(rank, ranks)))
    return {
        "parameters": flat_parameters(model),
        "state": stopping.state_dict(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def keep(folder: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Keep the best epochs in one folder."""
    checkpoint = TaskCheckpoint({"columns": "error", "classes": "accuracy"}, dirpath=folder)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="auto" if ranks == 1 else FLAVOURS["default"](),
        callbacks=[checkpoint],
        use_distributed_sampler=False,
        enable_checkpointing=True,
        max_epochs=4,
    )
    trainer.fit(module(), loader(*batches(rank, ranks)), loader(*batches(rank, ranks)))
    return checkpoint.state_dict()
