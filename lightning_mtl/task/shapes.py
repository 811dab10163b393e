"""Shapes of predictions and targets that an elementwise loss would broadcast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

_FUNCTIONS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.hinge_embedding_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
)
_MODULES = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HingeEmbeddingLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


def is_elementwise(loss: Any) -> bool:  # noqa: ANN401 - a module or a function
    """Whether a loss is one of torch's that compare element with element.

    Example:
        >>> is_elementwise(functools.partial(F.huber_loss, delta=2.0)), is_elementwise(nn.CrossEntropyLoss())
        (True, False)
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    if not isinstance(loss, nn.Module):
        return loss in _FUNCTIONS
    return any(isinstance(loss, kind) and type(loss).forward is kind.forward for kind in _MODULES)


class SeenShapes(set[tuple[str, bool]]):
    """The tasks, in training and in evaluation, whose shapes need no second look."""

    def check(self, task: str, training: bool, loss: Any, prediction: Any, target: Any) -> None:  # noqa: ANN401
        """Refuse shapes that a loss of torch would broadcast to all pairs; warn where it repeats one of the two.

        Predictions ``[B, 1]`` against targets ``[B]`` make ``[B, B]`` differences, of each prediction with each target.

        Raises:
            ValueError: If the shapes broadcast to more elements than either has.
        """
        if not (isinstance(prediction, Tensor) and isinstance(target, Tensor) and is_elementwise(loss)):
            self.add((task, training))
            return
        try:
            elements = torch.broadcast_shapes(prediction.shape, target.shape).numel()
        except RuntimeError:
            return  # the loss itself refuses them
        shapes = f"predictions of shape {list(prediction.shape)} and targets of shape {list(target.shape)}"
        if elements > max(prediction.numel(), target.numel()):
            raise ValueError(
                f"Task {task!r} has {shapes}, of which its loss would compare every prediction with every target. Give "
                "both one shape: unsqueeze the targets in the dataset, or squeeze the predictions in the head."
            )
        if elements > min(prediction.numel(), target.numel()):
            rank_zero_warn(
                f"Task {task!r} has {shapes}, of which its loss repeats the smaller one; give both one shape if that "
                "is not meant."
            )
        elif prediction.shape != target.shape:
            return  # as [1, 1] and [1] are: the next batch may have more samples
        self.add((task, training))
