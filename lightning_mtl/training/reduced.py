"""Logging of what has been reduced over the ranks before."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torchmetrics import SumMetric


def log_reduced(module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log an epoch's figures that are over all ranks already.

    As metrics, which Lightning asks for their value as they are: of plain numbers it would advise each user to reduce
    them over the ranks once more.
    """
    for name, value in values.items():
        figure = SumMetric(nan_strategy="disable", sync_on_compute=False)
        figure.update(value)
        module.log(name, figure, metric_attribute=name, batch_size=1)
