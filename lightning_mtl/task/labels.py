"""The part of a batch that carries a task's labels is selected here, where some are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves

MissingPer = Literal["element", "sample"]


class MaskedTarget(NamedTuple):
    """A target and the mask that says where it is labeled; what is not labeled may hold anything.

    A dataset may yield it in place of a target: default collation, pinned memory and the transfer to a device take it
    as any named tuple. It needs no ``Task(missing=...)``; where both are given, a label has to pass both.

    Args:
        target: A tensor, or a nested structure of tensors that all begin with the mask's dimensions.
        labeled: Boolean, True where there is a label: ``[B]``, one for each sample, or of the target's shape, one for
            each element.

    Example:
        >>> boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.0, 0.0, 0.0, 0.0]])
        >>> MaskedTarget(boxes, labeled=torch.tensor([True, False])).labeled.sum()
        tensor(1)
    """

    target: Any
    labeled: Any  # a tensor; True or False before collation


class LabeledPart(NamedTuple):
    """The labeled part of a prediction and its target; see :func:`labeled_part`."""

    prediction: Any
    target: Any
    num_samples: int
    num_missing: int


def labeled_part(
    prediction: Any,  # noqa: ANN401 - any nested structure of tensors
    target: Any,  # noqa: ANN401
    missing: float | None = None,
    missing_per: MissingPer = "element",
    class_dim: int | None = None,
) -> LabeledPart:
    """Select what is labeled of a prediction and its target.

    What is left depends on the mask, ``target is not missing`` or :class:`MaskedTarget`'s own:

    ==============================  =================================  ===================================
    mask                            prediction                         what is left, n labels
    ==============================  =================================  ===================================
    ``[B]`` or ``[B, 1]``           ``[B, ...]``, nested structures    ``[n, ...]``, samples stay whole
    of the target's shape           of the target's shape              ``[n]`` elements
    ``[B, H, W]``, a class a pixel  ``[B, C, H, W]``, class_dim 1      ``[n, C]``, and ``[n]`` of the target
    ``[B, T]``, a class a token     ``[B, T, C]``, class_dim -1        ``[n, C]``, and ``[n]`` of the target
    ==============================  =================================  ===================================

    Shapes show which of the last two it is, unless the numbers agree: logits of shape ``[B, 5, 5]`` are refused without
    ``class_dim``. Give it wherever lengths vary from batch to batch. On a GPU it waits for the number of labels, once.

    Args:
        prediction: What the task's head returned.
        target: What the batch holds for the task.
        missing: The value that stands for no label, NaN for instance; None if labels are missing by a mask alone.
        missing_per: ``"element"`` looks at each number by itself, ``"sample"`` drops a sample with any number missing.
        class_dim: The dimension of the classes in a prediction that has one more than the target. None infers it.

    Returns:
        The labeled prediction and target, the number of labels (samples where these stay whole, else elements), and
        the number that is missing.

    Raises:
        TypeError: If the mask is not boolean, or ``missing`` is asked of a target that is no tensor.
        ValueError: If shapes do not fit the mask or can be read in two ways, or ``missing`` is NaN and the target is of
            integers.

    Example:
        >>> part = labeled_part(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1.0, torch.nan, 1.5]), torch.nan)
        >>> part.prediction, part.target, part.num_samples, part.num_missing
        (tensor([0.5000, 1.0000]), tensor([1.0000, 1.5000]), 2, 1)
    """
    mask = None
    if isinstance(target, MaskedTarget):
        target, mask = target
        _check_mask(mask)
    if missing is not None:
        present = _present(target, missing, missing_per)
        mask = present if mask is None else _both(mask, present)
    if mask is None:
        return LabeledPart(prediction, target, number_of_samples(target), 0)
    if mask.numel() == mask.shape[0] and (class_dim is None or mask.ndim == 1 or not _is_for_elements(mask, target)):
        mask = mask.reshape(-1)  # [B, 1] says as much as [B], and samples keep their shape
    if mask.ndim > 1:
        prediction = _classes_last(prediction, target, mask, class_dim)
    where = mask.nonzero(as_tuple=True)
    found = len(where[0])
    left = mask.numel() - found
    if left == 0 and mask.ndim == 1:
        return LabeledPart(prediction, target, found, 0)
    return LabeledPart(_select(prediction, mask, where), _select(target, mask, where), found, left)


def _check_mask(mask: Any) -> None:  # noqa: ANN401 - what is checked here
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim == 0:
        found = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"MaskedTarget(labeled=...) must be a boolean tensor, True where labeled, one for each sample or "
            f"element; found {found}."
        )


def _present(target: Any, missing: float, missing_per: MissingPer) -> Tensor:  # noqa: ANN401
    if not isinstance(target, Tensor):
        raise TypeError(
            f"Task(missing={missing}) looks into targets that are tensors, found {type(target).__name__}; have the "
            "dataset yield MaskedTarget(target, labeled) instead."
        )
    if not math.isnan(missing):
        present = target != missing
    elif target.is_floating_point():
        present = target.isnan().logical_not()
    else:
        raise ValueError(
            f"Task(missing=nan) cannot find NaN among targets of {target.dtype}; give the integer that stands for no "
            "label, -100 for instance."
        )
    return present.flatten(1).all(1) if missing_per == "sample" and present.ndim > 1 else present


def _both(mask: Tensor, present: Tensor) -> Tensor:
    """Combine a mask of samples, or of elements, with another."""
    dimensions = max(mask.ndim, present.ndim)
    mask, present = (m.reshape(m.shape + (1,) * (dimensions - m.ndim)) for m in (mask, present))
    return mask & present


def _is_for_elements(mask: Tensor, target: Any) -> bool:  # noqa: ANN401
    return isinstance(target, Tensor) and target.shape == mask.shape


def _classes_last(prediction: Any, target: Any, mask: Tensor, class_dim: int | None) -> Any:  # noqa: ANN401
    """Move the classes of a prediction behind the dimensions of the mask."""
    if not _is_for_elements(mask, target):
        if class_dim is None:
            return prediction  # begins with the mask's dimensions, as the target does
        raise ValueError(
            f"Task(class_dim={class_dim}) needs a target tensor with one class for each element of the mask, of shape "
            f"{list(mask.shape)}; leave it out, and have predictions begin with these dimensions."
        )

    def move(value: Tensor) -> Tensor:
        if value.ndim != mask.ndim + 1:
            return value
        if class_dim is not None:
            return value.movedim(class_dim, -1)
        # Second is where losses of torch have them.
        second = value.shape[:1] + value.shape[2:] == mask.shape
        last = value.shape[:-1] == mask.shape
        if second and last:
            raise ValueError(
                f"A prediction of shape {list(value.shape)} can be read in two ways beside labels of shape "
                f"{list(mask.shape)}: give Task(class_dim=1) if its classes come second, Task(class_dim=-1) if they "
                "come last."
            )
        return value.movedim(1, -1) if second else value

    if class_dim is not None and isinstance(prediction, Tensor) and prediction.ndim != mask.ndim + 1:
        raise ValueError(
            f"Task(class_dim={class_dim}) needs predictions with one dimension more than the labels; found shape "
            f"{list(prediction.shape)} beside labels of shape {list(mask.shape)}."
        )
    return apply_to_collection(prediction, Tensor, move)


def _select(values: Any, mask: Tensor, where: tuple[Tensor, ...]) -> Any:  # noqa: ANN401
    def select(value: Tensor) -> Tensor:
        if value.shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"A mask of labels of shape {list(mask.shape)} cannot select from a tensor of shape "
                f"{list(value.shape)}: predictions and targets have to begin with the mask's dimensions; mark whole "
                'samples, by Task(missing_per="sample") or MaskedTarget with a mask of shape [batch].'
            )
        return value[where]

    return apply_to_collection(values, Tensor, select)


def number_of_samples(batch: Any) -> int:  # noqa: ANN401 - any nested structure of tensors
    """How many samples a target, or a batch's inputs, are of: the first tensor's first dimension, else 1.

    A list with one mapping an image, as detection has it, is of as many samples as it is long.

    Example:
        >>> number_of_samples({"boxes": torch.zeros(3, 4), "classes": torch.zeros(3)})
        3
        >>> number_of_samples([{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(2, 4)}])
        2
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, list) and batch and isinstance(batch[0], Mapping):
        return len(batch)
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    return 1 if first is None else first.shape[0]
