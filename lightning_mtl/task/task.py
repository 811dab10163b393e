"""A Task says what is learned; a TaskOutput says what one batch has shown of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_mtl.task.labels import MissingPer

LossFunction = Callable[[Any, Any], Tensor]


@dataclass
class Task:
    """One task of a multi-task model: its loss, its metrics and the score to beat.

    Args:
        loss: ``(prediction, target) -> scalar``; any function or :class:`torch.nn.Module`. A mean over the samples is
            what the weighting methods of the literature assume. Prediction and target are what the task's head returns
            and what the batch holds: tensors, or any nested structure of them.
        metrics: A torchmetrics metric or collection, called as ``update(prediction, target)``. It is cloned for each
            stage, and logged once an epoch as ``<stage>/<metric>/<task>``.
        baseline: Scores of a model trained on this task alone, ``{metric name: value}``, for ``val/delta_m``. The
            metric names are those of ``metrics``; ``"loss"`` stands for the task's loss.
        missing: The value in targets that stands for no label: NaN (``torch.nan``), or an integer among classes, what
            torch's losses call ``ignore_index``. Loss and metrics then see the labeled part alone, as
            :func:`~lightning_mtl.task.labels.labeled_part` selects it, and means are over the labels of all ranks.
            Looking costs a small selection a step, on a GPU a wait for its size; without it nothing is looked at.
        missing_per: ``"element"`` selects single numbers of targets that have several to a sample; ``"sample"`` leaves
            out samples with any number missing and keeps the others whole, as boxes have to be.
        class_dim: Where labels of single pixels or tokens are missing, the dimension of the predictions that holds the
            classes: 1 for ``[B, C, H, W]`` and ``[B, C, T]``, -1 for ``[B, T, C]``. None infers it, and refuses shapes
            that can be read in two ways; give it where lengths vary, so that T may come to equal C.

    Raises:
        TypeError: If ``loss`` cannot be called, ``metrics`` does not come from torchmetrics, or ``missing`` is no
            number, or ``class_dim`` no int.
        ValueError: If ``missing`` is not what the loss ignores, ``missing_per`` is neither of the two, or ``class_dim``
            is the samples' 0; or if
            ``baseline`` names a metric that the task does not have, or holds a zero, which no relative
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
    missing: float | None = None
    missing_per: MissingPer = "element"
    class_dim: int | None = None

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
        self._check_missing()
        known = {"loss", *self.metric_collection()}
        for name, value in (self.baseline or {}).items():
            if name not in known:
                raise ValueError(f"Task(baseline=...) names {name!r}, but the task's metrics are {sorted(known)}.")
            if value == 0:
                raise ValueError(
                    f"Task(baseline=...) gives {name!r} the value 0; delta_m divides by it. Leave {name!r} out."
                )
            self.higher_is_better(name)

    def _check_missing(self) -> None:
        found: object = self.missing
        if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
            raise TypeError(
                f"Task(missing={found!r}) must be the number that stands for no label, torch.nan or -100 for instance."
            )
        if self.missing_per not in ("element", "sample"):
            raise ValueError(f"Task(missing_per={self.missing_per!r}) must be 'element' or 'sample'.")
        if self.class_dim is not None and (isinstance(self.class_dim, bool) or not isinstance(self.class_dim, int)):
            raise TypeError(f"Task(class_dim={self.class_dim!r}) must be an int, 1 or -1 for instance.")
        if self.class_dim == 0:
            raise ValueError("Task(class_dim=0) is the dimension of the samples; classes lie in dimension 1 or -1.")
        keywords = self.loss.keywords if isinstance(self.loss, functools.partial) else {}
        ignored = keywords.get("ignore_index", getattr(self.loss, "ignore_index", None))
        # -100 is what torch's losses ignore when nobody has asked them to.
        if self.missing is not None and ignored not in (None, -100, self.missing):
            raise ValueError(
                f"Task(missing={self.missing}) has a loss that ignores {ignored}; give both the same number, so that "
                "what the loss is a mean over is what is counted."
            )

    def higher_is_better(self, name: str) -> bool:
        """Whether a higher value of the metric, or of ``"loss"``, is better.

        Raises:
            ValueError: If the task has no such metric, or the metric does not say.
        """
        if name == "loss":
            return False
        metrics = self.metric_collection()
        try:
            direction = metrics[name].higher_is_better
        except KeyError as error:
            known = sorted(["loss", *map(str, metrics)])
            raise ValueError(f"There is no metric {name!r} among the task's, {known}.") from error
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
        num_samples: How many labeled samples the loss is a mean over; 0 stands for an absent task. Epoch means,
            gradients averaged over ranks, and gradients accumulated at the trunk are then exact sample means; without
            it all batches count the same.

    Example:
        >>> import torch
        >>> TaskOutput(torch.tensor(0.5), num_samples=3).num_samples
        3
    """

    loss: Tensor
    prediction: Any = field(default=None, repr=False)
    target: Any = field(default=None, repr=False)
    num_samples: int | Tensor | None = None


def check_task_name(task: object) -> None:
    """Task names become module names, so that what ``nn.ModuleDict`` cannot hold is refused."""
    rule = "Task names become names of modules: a non-empty string without dots that is no attribute of nn.ModuleDict"
    if not isinstance(task, str) or not task or "." in task:
        raise ValueError(f"{task!r} cannot name a task. {rule}.")
    if hasattr(nn.ModuleDict(), task):
        raise ValueError(f"{task!r} cannot name a task. {rule}, as {task!r} is; {task + '_task'!r} would do.")
