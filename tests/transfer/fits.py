"""Fits that are counted, and data for them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from tests.small import batch, batches
from tests.training import loader, quiet_trainer


class Counted(pl.Callback):
    """Counts fits, of all Trainers that it was made for."""

    fits = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Counted.fits += 1


def counted_trainer(max_epochs: int, **arguments: Any) -> pl.Trainer:
    return quiet_trainer(max_epochs=max_epochs, callbacks=[Counted()], **arguments)


def quiet_data() -> tuple[Any, Any]:
    return loader(*batches(4, 5)), loader(batch(6, seed=9))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return quiet_data()[0]

    def val_dataloader(self) -> Any:
        return quiet_data()[1]

    def test_dataloader(self) -> Any:
        return loader(batch(7, seed=11))
