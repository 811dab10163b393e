"""What a task is, and what one batch says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Task:
    """One task of a multi-task model: its loss, its metrics and the score to beat.

    Args:
        loss: ``(prediction, target) -> scalar``; any function or :class:`torch.nn.Module`. A mean over the samples is
            what the weighting methods of the literature assume.
        metrics: A torchmetrics metric or collection, called as ``update(prediction, target)``. It is cloned for each
            stage, and logged once an epoch as ``<stage>/<metric>/<task>``.
        baseline: Scores of a model trained on this task alone, ``{metric name: value}``, for ``val/delta_m``. The
            metric names are those of ``metrics``; ``"loss"`` stands for the task's loss.

    Raises:
        TypeError: If ``loss`` cannot be called or ``metrics`` does not come from torchmetrics.
        ValueError: If ``baseline`` names a metric that the task does not have, or holds a zero, which no relative
            difference can be taken from.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> task = Task(cross_entropy, MetricCollection({"accuracy": MulticlassAccuracy(10)}), {"accuracy": 0.97})
        >>> sorted(task.metric_collection())
        ['accuracy']
    """

    loss: nn.Module | LossFunction
    metrics: Metric | MetricCollection | None = None
    baseline: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(
                f"Task(loss=...) must be a function (prediction, target) -> scalar, found {type(self.loss).__name__}."
            )
        if self.metrics is not None and not isinstance(self.metrics, Metric | MetricCollection):
            raise TypeError(
                "Task(metrics=...) must be a torchmetrics Metric or MetricCollection, found "
                f"{type(self.metrics).__name__}. Wrap several metrics in a MetricCollection."
            )
        known = {"loss", *self.metric_collection()}
        for name, value in (self.baseline or {}).items():
            if name not in known:
                raise ValueError(f"Task(baseline=...) names {name!r}, but the task's metrics are {sorted(known)}.")
            if value == 0:
                raise ValueError(
                    f"Task(baseline=...) gives {name!r} the value 0; delta_m divides by it. Leave {name!r} out."
                )
            self.higher_is_better(name)

    def higher_is_better(self, name: str) -> bool:
        """Whether a higher value of the metric, or of ``"loss"``, is better.

        Raises:
            ValueError: If the metric does not say.
        """
        if name == "loss":
            return False
        direction = self.metric_collection()[name].higher_is_better
        if direction is None:
            raise ValueError(
                f"The metric {name!r} does not say whether higher is better; leave it out of the baseline."
            )
        return bool(direction)

    def metric_collection(self) -> MetricCollection:
        """A fresh copy of the metrics as a collection, maybe empty; a lone metric goes by its class name."""
        if self.metrics is None:
            return MetricCollection([])
        return MetricCollection([self.metrics.clone()]) if isinstance(self.metrics, Metric) else self.metrics.clone()


@dataclass
class TaskOutput:
    """What one batch says about one task, for a ``task_losses`` that reports more than a loss.

    Args:
        loss: The task's loss, a scalar with its graph.
        prediction: What the task's metrics take first; none leaves the metrics alone.
        target: What the task's metrics take second.
        num_samples: How many labelled samples the loss is a mean over; 0 stands for an absent task. Epoch means,
            gradients averaged over ranks, and gradients accumulated at the trunk are then exact sample means; without
            it all batches count the same.

    Example:
        >>> import torch
        >>> TaskOutput(torch.tensor(0.5), num_samples=3).num_samples
        3
    """

    loss: Tensor
    prediction: Tensor | None = field(default=None, repr=False)
    target: Tensor | None = field(default=None, repr=False)
    num_samples: int | Tensor | None = None
