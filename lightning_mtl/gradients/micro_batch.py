"""What travels between a module, its weighting and the gradient engine within one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.gradients.cut import FeatureCut


@dataclass
class MicroBatch:
    """One forward pass, before any gradient.

    Attributes:
        names: The K present tasks.
        losses: Their losses, with graphs; each a scalar.
        penalty: The sum of the penalties, weight 1, no task; None if there are none.
        cut: Where the trunk ends, if the update needs to know.
    """

    names: Sequence[str]
    losses: list[Tensor]
    penalty: Tensor | None
    cut: FeatureCut

    def stacked(self) -> Tensor:
        """The losses as one ``[K]`` tensor with its graph, in the widest of their dtypes."""
        dtypes = {loss.dtype for loss in self.losses}
        if len(dtypes) == 1:
            return torch.stack(self.losses)
        widest = dtypes.pop()
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return torch.stack([loss.to(widest) for loss in self.losses])


@dataclass
class Measured:
    """What was learned about the tasks' gradients.

    Attributes:
        gramian: ``[K, K]``, float64, on the CPU.
        norms: ``[K]``.
        rows: ``[K, n]`` matrices whose columns together make up the gradients.
    """

    gramian: Tensor | None = None
    norms: Tensor | None = None
    rows: Sequence[Tensor] = ()


@dataclass
class Decision:
    """What a weighting made of it: weights, or the direction itself, one ``[n]`` tensor for each matrix of rows."""

    weights: Tensor
    directions: Sequence[Tensor] | None = None


Decide = Callable[[Measured], Decision]


def weighted_head_gradients(
    per_task: Sequence[dict[Tensor, Tensor]], weights: Tensor | None, outer: Tensor
) -> dict[Tensor, Tensor]:
    """Sum the tasks' gradients of the parameters above the cut, each times its weight (None: 1) and ``outer``."""
    total: dict[Tensor, Tensor] = {}
    for task, gradients in enumerate(per_task):
        if not gradients:
            continue
        factor = outer if weights is None else outer * weights[task]
        scaled = torch._foreach_mul(list(gradients.values()), factor)
        for parameter, gradient in zip(gradients, scaled, strict=True):
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total
