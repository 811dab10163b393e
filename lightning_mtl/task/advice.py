"""What to change where a loss, a metric, a head or a trunk refuses what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

IGNORED = -100
CLASS_DTYPES = (torch.int64, torch.uint8)


def describe(value: Any) -> str:  # noqa: ANN401 - whatever a head returns
    """Name a tensor's type and shape, or an object's class.

    Example:
        >>> describe(torch.zeros(2, 3))
        'float32 [2, 3]'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def on_loss(prediction: Any, target: Any) -> str:  # noqa: ANN401 - any pytree
    """Say of what types and shapes prediction and target are, and which of them are none that torch's losses take.

    Example:
        >>> on_loss(torch.zeros(4, 3), torch.zeros(4))
        'predictions are float32 [4, 3], targets float32 [4]; class labels have to be int64: target.long()'
    """
    said = f"predictions are {describe(prediction)}, targets {describe(target)}"
    if not (isinstance(prediction, Tensor) and isinstance(target, Tensor) and prediction.is_floating_point()):
        return said
    if prediction.ndim == target.ndim + 1:
        classes = prediction.shape[1] if prediction.ndim > 1 else 1
        if target.dtype not in CLASS_DTYPES:
            return f"{said}; class labels have to be int64: target.long()"
        # Torch's losses ignore -100. After an error of its own, a device answers no more.
        known = target[target >= 0] if target.device.type == "cpu" else target.new_empty(0, device="cpu")
        if known.numel() and int(known.max()) >= classes:
            return (
                f"{said}; the labels reach {int(known.max())}, and the head gives classes 0 to {classes - 1}: give the "
                "head more outputs, or count labels from 0"
            )
    elif prediction.ndim == target.ndim and not target.is_floating_point():
        return f"{said}; this loss needs real numbers as targets: target.float()"
    return said


def on_metrics(metrics: Iterable[tuple[str, Metric]], prediction: Any, target: Any) -> str:  # noqa: ANN401
    """Name a metric with another number of classes than predictions have, or labels of -100; else what it was given."""
    said = f"predictions are {describe(prediction)}, targets {describe(target)}"
    # After an error of its own, a device answers no more.
    if isinstance(target, Tensor) and target.device.type == "cpu" and bool((target == IGNORED).any()):
        return f"{said}; some targets are {IGNORED}, which losses ignore and metrics do not: Task(missing={IGNORED})"
    if isinstance(prediction, Tensor) and isinstance(target, Tensor) and prediction.ndim == target.ndim + 1:
        given = prediction.shape[1]
        for name, metric in metrics:
            number = getattr(metric, "num_classes", None)
            if isinstance(number, int) and number != given:
                return f"{said}; {name} has num_classes={number}, and the head gives {given}: make both the same"
    return said


def on_head(head: nn.Module, features: Any) -> str:  # noqa: ANN401 - whatever a trunk returns
    """Name a head's first layer whose width is not that of the features; else what the head was given."""
    said = f"the trunk gives {describe(features)}"
    first = next((part for part in head.modules() if isinstance(part, nn.Linear)), None)
    if first is None or not isinstance(features, Tensor) or not features.ndim:
        return said
    if first.in_features == features.shape[-1]:
        return said
    return f"{said}, and the head's first layer takes {first.in_features} features: make both widths the same"


def on_trunk(trunk: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> str | None:
    """Say how a trunk is called, where its ``forward`` does not take the arguments that the batch's inputs make."""
    signature = inspect.signature(trunk.forward)
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        kind = type(trunk).__name__
        takes = f"{kind}.forward{str(signature).partition(' ->')[0]}"
        if named:
            key = next(iter(named))
            return (
                f"The batch's inputs are a dict with the keys {list(named)}, which become keyword arguments, and "
                f"{takes} does not take them ({error}). Yield the tensor itself, name the one key, "
                f"MultiTaskModule(inputs={key!r}), or write a trunk with forward(self, {', '.join(map(str, named))})."
            )
        return (
            f"The batch's inputs are {len(positional)} objects, which become positional arguments, and {takes} does "
            f"not take them ({error}). Yield one tensor, or write a trunk that takes all of them."
        )
    return None


def class_for_object(argument: str, given: object) -> TypeError | None:
    """The refusal of a class where an object of it is meant."""
    if not isinstance(given, type):
        return None
    return TypeError(
        f"{argument} was given the class {given.__name__}, not an object of it; make one: {given.__name__}()."
    )
