"""The values of a task's metrics at the end of a stage."""

from __future__ import annotations

import warnings

from torch import Tensor
from torchmetrics import MetricCollection


def compute_and_reset(task: str, metrics: MetricCollection) -> dict[str, Tensor]:
    """Compute and reset a task's metrics.

    Raises:
        ValueError: If a metric computes more than one number.
    """
    with warnings.catch_warnings():
        # A rank without a sample has nothing to compute from but what the others send.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
        values: dict[str, Tensor] = metrics.compute()
    metrics.reset()
    for name, value in values.items():
        if value.numel() != 1:
            shape = list(value.shape)
            raise ValueError(
                f"Metric {name!r} of task {task!r} computes shape {shape}, which cannot be logged as one number; wrap "
                "it (torchmetrics.ClasswiseWrapper for one value a class), or log it from a callback of your own."
            )
    return values
