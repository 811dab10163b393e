"""Trains from every case's data module, as one of a pair or in one process that stands for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from lightning_mtl.data import Joint, MultiTaskDataModule, Proportional, Ratios, RoundRobin, Schedule
from tests.loaders.samples import Flowing, Numbered, Remembering, Sized, Watch, module, numbers
from tests.training import flat_parameters, quiet_trainer

# Of 4 samples a step on both ranks: 21 leave one sample, which one rank alone has; 16 divide evenly; of 1 there is one.
SIZES = {"a": 21, "b": 16, "c": 1}
EVEN = {"a": 20, "b": 16, "c": 4}
EPOCHS = 2
SAVE_AFTER = 7


def of(sizes: dict[str, int], mixing: Any, ranks: int, **arguments: Any) -> MultiTaskDataModule:
    """On two ranks half the batch size of one, to have the same batches."""
    train = {task: Numbered(size) for task, size in sizes.items()}
    val = {"a": Numbered(5), "b": Numbered(3)}
    return MultiTaskDataModule(train, val, mixing=mixing, batch_size=4 // ranks, seed=3, **arguments)


def iterables(ranks: int) -> MultiTaskDataModule:
    train = {"a": Flowing(7), "b": Remembering(10), "c": Sized(5)}
    val = {"a": Flowing(5), "b": Sized(3)}
    return MultiTaskDataModule(
        train, val, mixing=RoundRobin(), batch_size=4 // ranks, steps_per_epoch=9, shard_iterables=True
    )


Make = Callable[[int], MultiTaskDataModule]
CASES: dict[str, Make] = {
    "joint": functools.partial(of, SIZES, Joint()),
    "shortest": functools.partial(of, EVEN, Joint("shortest")),
    "round robin": functools.partial(of, SIZES, RoundRobin()),
    "proportional": functools.partial(of, SIZES, Proportional()),
    "temperature": functools.partial(of, EVEN, Proportional(temperature=3)),
    "ratios": functools.partial(of, EVEN, Ratios({"a": 1, "b": 2, "c": 1})),
    "schedule": functools.partial(of, EVEN, Schedule({0: Proportional(), 1: Joint()})),
    "workers": functools.partial(of, EVEN, Joint(), num_workers=1),
    "iterables": iterables,
}
RESUMED = ("joint", "iterables")


class WatchAll(Watch):
    """Keeps what validation saw, too."""

    def __init__(self, save_after: int = -1, path: Path | None = None) -> None:
        super().__init__(save_after, path)
        self.validated: dict[str, list[int]] = {}

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        for task, pair in batch.items():
            self.validated.setdefault(task, []).extend([] if pair is None else numbers(pair[0]))


def run(make: Make, ranks: int, **arguments: Any) -> dict[str, Any]:
    ckpt, watch = arguments.pop("ckpt", None), WatchAll(**arguments)
    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    trainer = quiet_trainer(devices=ranks, strategy=strategy, max_epochs=EPOCHS, callbacks=[watch])
    model = module(tuple(SIZES))
    trainer.fit(model, datamodule=make(ranks), ckpt_path=ckpt)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "epochs": watch.epochs,
        "validated": watch.validated,
        "metrics": metrics,
        "parameters": flat_parameters(model),
    }


def train(name: str, folder: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """What one case saw, and where it saves, what it saw after it was resumed."""
    make = CASES[name]
    if name not in RESUMED:
        return {name: run(make, ranks)}
    # The file of rank 0 alone is written, as everywhere.
    path = folder / f"{name}-{ranks}.ckpt"
    return {
        name: run(make, ranks, save_after=SAVE_AFTER, path=path),
        f"{name}, resumed": run(make, ranks, ckpt=path),
    }
