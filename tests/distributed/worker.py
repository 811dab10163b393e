"""Trains cases of the table, in one process or on one of two ranks under a flavour of DDP."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mtl import Monitor, Signals
from tests.distributed.data import TASKS, Faces, batches, cut
from tests.distributed.pairs import RANKS
from tests.distributed.table import FLAVOURS, Case, cases
from tests.training import flat_parameters, loader


class Diary(Monitor):
    """Keeps what each step left behind."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.ungraded: list[list[str]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Faces)
        self.parameters.append(flat_parameters(pl_module))
        running = [buffer.double().flatten() for name, buffer in pl_module.trunk.named_buffers()]
        self.buffers.append(torch.cat(running).clone() if running else torch.zeros(0))
        self.ungraded.append([k for k in TASKS if all(p.grad is None for p in pl_module.heads[k].parameters())])

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        applied = torch.zeros(len(TASKS), dtype=torch.float64)
        for task in signals.tasks if weights is not None else ():
            applied[TASKS.index(task)] = weights[TASKS.index(task)]  # type: ignore[index]  # mypy forgets in a loop
        self.weights.append(applied)


def parts_for(case: Case, rank: int, ranks: int) -> DataLoader[Any]:
    """A rank's loader; one process stands for two ranks where the mean over ranks is what counts."""
    whole = batches(case.batches, case.pattern)
    if ranks > 1:
        return loader(*([cut(part, rank, ranks)] for part in whole))
    if case.pattern in ("uncounted", "loaders"):
        return loader(*([cut(part, r, RANKS) for r in range(RANKS)] for part in whole))
    return loader(*([part] for part in whole))


def train(case: Case, flavour: str, rank: int = 0) -> dict[str, Any]:
    """Train one case of the table, in one process or as one of a pair."""
    ranks = 1 if flavour == "single" else RANKS
    weighting, diary = case.weighting(), Diary()
    arguments, for_trainer = dict(case.arguments), {}
    if case.automatic:
        arguments, for_trainer = {}, arguments
    metrics = case.validates or (weighting is not None and weighting.step_metric is not None)
    module = case.module(case.trunk, case.pattern, metrics=metrics, **arguments)
    module.automatic_optimization = case.automatic
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if flavour == "single" else FLAVOURS[flavour](),
        max_epochs=case.epochs,
        callbacks=[diary, *([] if weighting is None else [weighting])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **for_trainer,
    )
    trainer.fit(module, parts_for(case, rank, ranks), parts_for(case, rank, ranks) if case.validates else None)
    return {
        "parameters": torch.stack(diary.parameters),
        "buffers": torch.stack(diary.buffers),
        "weights": torch.stack(diary.weights),
        "ungraded": diary.ungraded,
        "state": {} if weighting is None else weighting.state_dict()["state"],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
    }


def train_on_rank(flavour: str, name: str, rank: int, ranks: int) -> dict[str, Any]:
    """One case of the flavour's table, as one of a pair."""
    return train(cases(flavour)[name], flavour, rank)
