"""Trains with monitors, in one process or as one of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_mtl import Monitor, Signals, Weighting
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity, Throughput
from lightning_mtl.weighting import MGDA, UncertaintyWeighting
from tests.distributed.data import Faces, batches, cut
from tests.training import flat_parameters, loader, quiet_trainer

BATCHES = 12
WAYS: Mapping[str, Callable[[], Weighting | None]] = {
    "none": lambda: None,
    "losses": UncertaintyWeighting,
    "features": lambda: MGDA(at="features"),
    "rows": MGDA,
}


class Breaks(GradientConflict):
    """Fails at the sixth step, on the second rank alone."""

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        if trainer.global_rank == 1 and signals.step >= 6:
            raise RuntimeError("on purpose")
        super().observe(trainer, pl_module, signals, weights)


class LooksNowhere(TaskAffinity):
    """Cannot say how far to look ahead, on the second rank alone."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def lookahead_rate(self, pl_module: pl.LightningModule) -> float:
        if pl_module.global_rank == 1 and pl_module.global_step >= 6:
            raise RuntimeError("on purpose")
        return super().lookahead_rate(pl_module)


def monitors() -> list[Monitor]:
    quiet: dict[str, Any] = {"every_n_steps": 2, "figure": False}
    return [
        GradientConflict(**quiet),
        GradientConflict(at="features", name="at_features", **quiet),
        GradientConflict(at="last_layer", name="at_last_layer", **quiet),
        TaskAffinity(**quiet),
        TaskAffinity(exact=True, name="lookahead", **quiet),
        Convergence(2),
        Throughput(2),
    ]


def train(way: str, watching: list[Monitor], rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    weighting = WAYS[way]()
    module = Faces("plain", "counted", metrics=False)
    whole = batches(BATCHES, "counted")
    data = [[part] for part in whole] if ranks == 1 else [[cut(part, rank, ranks)] for part in whole]
    trainer = quiet_trainer(
        devices=ranks,
        strategy="auto" if ranks == 1 else DDPStrategy(process_group_backend="gloo"),
        callbacks=[*watching, *([] if weighting is None else [weighting])],
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(*data), loader(*data[:2]))
    return {
        "parameters": flat_parameters(module),
        "sums": [m.whole.sums for m in watching if isinstance(m, GradientConflict | TaskAffinity)],
        "off": [m.off for m in watching],
        "steps": trainer.global_step,
    }


def train_watched(way: str, rank: int, ranks: int) -> dict[str, Any]:
    return train(way, monitors(), rank, ranks)


def train_unwatched(way: str, rank: int, ranks: int) -> dict[str, Any]:
    return train(way, [], rank, ranks)


def train_broken(rank: int, ranks: int) -> dict[str, Any]:
    """With two monitors of three that fail on the second rank."""
    watching: list[Monitor] = [
        Breaks(2, figure=False),
        LooksNowhere(2, exact=True, figure=False),
        GradientConflict(2, at="features", figure=False, name="whole"),
    ]
    return train("losses", watching, rank, ranks)
