"""A Task says what is learned; a TaskOutput says what one batch has shown of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_mtl.task.advice import class_for_object
from lightning_mtl.task.labels import MissingPer
from lightning_mtl.task.units import Standardize, check_standardize

Role = Literal["main", "auxiliary"]
LossFunction = Callable[[Any, Any], Tensor]
Metrics = Metric | MetricCollection | Mapping[str, Metric | MetricCollection] | Sequence[Metric | MetricCollection]


@dataclass
class Task:
    """One task of a multi-task model: its loss, its metrics and the score to beat.

    Args:
        loss: ``(prediction, target) -> scalar``; any function or :class:`torch.nn.Module`. A mean over the samples is
            what the weighting methods of the literature assume. Prediction and target are what the task's head returns
            and what the batch holds: tensors, or any nested structure of them.
        metrics: A torchmetrics metric, a collection, or a list or dict of metrics, called as ``update(prediction,
            target)``. They are cloned for each stage, and logged once an epoch as ``<stage>/<metric>/<task>``. Of a
            metric that computes a dict, such as ``MeanAveragePrecision``, each number goes by its key, as
            ``MetricCollection`` has it (``<metric>_<key>`` where two metrics have a key in common); what is no single
            number is left out with a warning.
        baseline: Scores of a model trained on this task alone, ``{metric name: value}``, for ``val/delta_m``. The
            names are those that are logged; ``"loss"`` stands for the task's loss. A name that only a dict could have
            is checked once one is computed, at the sanity check or the first validation.
        missing: The value in targets that stands for no label: NaN (``torch.nan``), or an integer among classes, what
            torch's losses call ``ignore_index``. Loss and metrics then see the labeled part alone, as
            :func:`~lightning_mtl.task.labels.labeled_part` selects it, and means are over the labels of all ranks.
            Looking costs a small selection a step, on a GPU a wait for its size; without it nothing is looked at.
        missing_per: ``"element"`` selects single numbers of targets that have several to a sample; ``"sample"`` leaves
            out samples with any number missing and keeps the others whole, as boxes have to be.
        role: ``"main"``, or ``"auxiliary"`` for a task that is there to help the main ones. The methods for auxiliary
            tasks (:class:`~lightning_mtl.weighting.MetaBalance`, :class:`~lightning_mtl.weighting.AuxiliaryCosine`)
            read it, monitors say how often such a task has helped, and a module with ``delta_m_over = "main"`` leaves
            it out of ``val/delta_m``; to all else tasks are alike.
        class_dim: Where labels of single pixels or tokens are missing, the dimension of the predictions that holds the
            classes: 1 for ``[B, C, H, W]`` and ``[B, C, T]``, -1 for ``[B, T, C]``. None infers it, and refuses shapes
            that can be read in two ways; give it where lengths vary, so that T may come to equal C.
        loss_scale: What the loss L is divided by before a method sees it: a number; ``"initial"``, the absolute loss of
            the task's first micro-batch; or ``"running"``, its exponential mean, 0.99 of the old and 0.01 of each step.
            For losses in units that differ by orders of magnitude. ``loss/<task>`` and ``grad_norm/<task>`` stay those
            of L, and ``weight/<task>`` is the method's weight over the scale: what multiplies L. Monitors see what
            methods see.
        standardize: Whether the targets of a regression are standardized in the loss, as the head then predicts them;
            predictions, metrics and exports stay in the targets' own units. True takes one mean and standard deviation
            of all the training data's labels, read once before a fit that does not know them yet; a pair ``(mean,
            std)`` gives them, numbers, or sequences that fit the targets' last dimension; ``"running"`` follows the
            batches and corrects the head's last layer (PopArt, 2016, arXiv:1602.07714), for data that can be read but
            once. The targets have to be real numbers, of the predictions' shape.

    Raises:
        TypeError: If ``loss`` cannot be called, a metric does not come from torchmetrics, or ``missing`` is no
            number, or ``class_dim`` no int.
        ValueError: If ``role`` or ``missing_per`` is neither of its two, ``missing`` is not what the loss ignores, or
            ``class_dim`` is the samples' 0; if ``baseline`` names a metric that the task does not have, or holds a
            zero, which no relative difference can be taken from; or if a metric is called ``loss`` or ``delta_m``.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> task = Task(cross_entropy, MetricCollection({"accuracy": MulticlassAccuracy(10)}), {"accuracy": 0.97})
        >>> sorted(task.metric_collection())
        ['accuracy']
    """

    loss: nn.Module | LossFunction
    metrics: Metrics | None = None
    baseline: Mapping[str, float] | None = None
    missing: float | None = None
    missing_per: MissingPer = "element"
    class_dim: int | None = None
    role: Role = "main"
    loss_scale: float | Literal["initial", "running"] | None = None
    standardize: Standardize = False

    def __post_init__(self) -> None:
        if (refused := class_for_object("Task(loss=...)", self.loss)) is not None:
            raise refused
        if not callable(self.loss):
            raise TypeError(
                f"Task(loss=...) must be a function (prediction, target) -> scalar, found {type(self.loss).__name__}."
            )
        if self.role not in ("main", "auxiliary"):
            raise ValueError(f"Task(role={self.role!r}) must be 'main' or 'auxiliary'.")
        self._check_metrics()
        self._check_missing()
        _check_loss_scale(self.loss_scale)
        self.standardize = check_standardize(self.standardize)
        for name, value in (self.baseline or {}).items():
            if not self.has_metric(name):
                known = sorted({"loss", *self.metric_collection()})
                raise ValueError(f"Task(baseline=...) names {name!r}, but the task's metrics are {known}.")
            if value == 0:
                raise ValueError(
                    f"Task(baseline=...) gives {name!r} the value 0; delta_m divides by it. Leave {name!r} out."
                )
            self.higher_is_better(name)

    def _check_metrics(self) -> None:
        given: object = self.metrics
        if given is None:
            return
        if isinstance(given, Mapping):
            found = list(given.values())
        else:
            found = list(given) if isinstance(given, list | tuple) else [given]
        kinds = Metric | MetricCollection
        if refused := [wrong for one in found if (wrong := class_for_object("Task(metrics=...)", one)) is not None]:
            raise refused[0]
        if others := [type(metric).__name__ for metric in found if not isinstance(metric, kinds)]:
            raise TypeError(
                "Task(metrics=...) must be a torchmetrics Metric or MetricCollection, or a list or dict of them, found "
                f"{others[0]}."
            )
        for name in self.metric_collection():
            if name in RESERVED_METRICS:
                raise ValueError(
                    f"Task(metrics=...) names a metric {name!r}, which is what the package logs by that name; rename "
                    "it, in a MetricCollection({name: metric})."
                )

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
        direction = self.metric_named(name).higher_is_better
        if direction is None:
            raise ValueError(
                f"The metric {name!r} does not say whether higher is better; leave it out of the baseline."
            )
        return bool(direction)

    def has_metric(self, name: str) -> bool:
        """Whether ``name`` is ``"loss"`` or a metric, or may be a key of what a metric computes."""
        try:
            return name == "loss" or self.metric_named(name) is not None
        except ValueError:
            return False

    def metric_named(self, name: str) -> Metric:
        """The metric that computes what is logged by this name; a key of a dict is its metric's.

        Raises:
            ValueError: If the task has no such metric, or several may have that key and differ in direction.
        """
        metrics = dict(self.metric_collection().items())
        if name in metrics:
            return metrics[name]
        mappings = {str(own): metric for own, metric in metrics.items() if computes_dict(metric) is not False}
        found = [metric for own, metric in mappings.items() if name.startswith(f"{own}_")] or list(mappings.values())
        if not found:
            raise ValueError(f"There is no metric {name!r} among the task's, {sorted(['loss', *map(str, metrics)])}.")
        if len({metric.higher_is_better for metric in found}) > 1:
            raise ValueError(
                f"{name!r} may be a key of any of {list(mappings)}, of which some are better when higher and some when "
                "lower; leave it out."
            )
        return found[0]

    def metric_collection(self) -> MetricCollection:
        """A fresh copy of the metrics as a collection, maybe empty; a lone metric goes by its class name."""
        if self.metrics is None:
            return MetricCollection([])
        if isinstance(self.metrics, MetricCollection):
            return self.metrics.clone()
        given = self.metrics
        if isinstance(given, Metric):
            given = [given]
        return MetricCollection(dict(given) if isinstance(given, Mapping) else list(given)).clone()


def _check_loss_scale(found: object) -> None:
    number = isinstance(found, float | int) and not isinstance(found, bool) and 0 < found < float("inf")
    if not number and found not in (None, "initial", "running"):
        raise ValueError(f"Task(loss_scale={found!r}) must be a positive number, 'initial' or 'running'.")


RESERVED_METRICS = ("loss", "delta_m")  # val/loss/<task> and val/delta_m are logged without any metric


def computes_dict(metric: Metric) -> bool | None:
    """Whether a metric computes a dict of numbers, by its annotation; None where it has none that says so.

    Example:
        >>> from torchmetrics import MeanSquaredError, MinMaxMetric
        >>> computes_dict(MeanSquaredError()), computes_dict(MinMaxMetric(MeanSquaredError()))
        (False, True)
    """
    annotation = type(metric).compute.__annotations__.get("return", "")
    said = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if said in ("Tensor", "torch.Tensor", "float"):
        return False
    return True if said.startswith(("dict", "Dict")) else None


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
        residuals: The numbers r whose mean square the loss is, with their graph, any shape: what
            :class:`~lightning_mtl.weighting.NTKWeighting` differentiates. A factor c before the loss belongs into them
            as √c.

    Example:
        >>> import torch
        >>> TaskOutput(torch.tensor(0.5), num_samples=3).num_samples
        3
    """

    loss: Tensor
    prediction: Any = field(default=None, repr=False)
    target: Any = field(default=None, repr=False)
    num_samples: int | Tensor | None = None
    residuals: Tensor | None = field(default=None, repr=False)


def name_task(error: Exception, part: str, task: str, advice: str = "") -> None:
    """Say in an error from a task's loss, head or metrics which task it was, and what to change; its type stays."""
    note = f"in the {part} of task {task!r}{f': {advice}' if advice else ''}"
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):  # Python 3.10 has no notes
        error.args = (f"{error.args[0]} ({note})", *error.args[1:])
