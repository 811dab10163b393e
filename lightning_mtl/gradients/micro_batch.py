"""What travels between a module, its weighting and the gradient engine within one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.ranks import Ranks


@dataclass
class MicroBatch:
    """One forward pass, before any gradient.

    Attributes:
        names: The K tasks present on some rank.
        losses: This rank's losses of them, with graphs; each a scalar, a mere 0 for a task that the rank lacks.
        absent: The tasks that this rank lacks.
        penalty: The sum of the penalties, weight 1, no task; None if there are none.
        cut: Where the trunk ends, if the update needs to know.
        seeds: ``[K]``, what each loss's gradient is multiplied by: the rank's share; None for all ones.
        scale: A gradient scaler's factor, put on while gradients are taken and off again before anyone sees them.
        ranks: The processes that train together.
    """

    names: Sequence[str]
    losses: list[Tensor]
    penalty: Tensor | None
    cut: FeatureCut
    absent: Sequence[str] = ()
    seeds: Tensor | None = None
    scale: Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)

    def unscaled(self, outer: Tensor) -> Tensor:
        """The incoming gradient without the scaler's factor, which the measured gradients already have."""
        return outer if self.scale is None else outer / self.scale


@dataclass
class Measured:
    """What was learned about the tasks' gradients, over all ranks.

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
    """What a weighting made of it: weights, or the direction itself, one ``[n]`` tensor for each matrix of rows.

    The heads are scaled by ``head_weights`` where a method has numbers of their own for them.
    """

    weights: Tensor
    directions: Sequence[Tensor] | None = None
    head_weights: Tensor | None = None

    def for_heads(self, *, weighs_heads: bool) -> Tensor | None:
        """What scales the gradients of each task's own head, ``[K]``; None for 1."""
        return self.weights if weighs_heads and self.head_weights is None else self.head_weights


Decide = Callable[[Measured], Decision]


def measured_gramian(products: Tensor, scale: Tensor | None, rows: Sequence[Tensor] = ()) -> Measured:
    """A Gramian and the norms on its diagonal, a scaler's factor taken off."""
    if scale is not None:
        products = products / scale.detach().cpu().double().square()
    return Measured(gramian=products, norms=products.diagonal().sqrt(), rows=rows)


def measured_norms(norms: Tensor, scale: Tensor | None, rows: Sequence[Tensor] = ()) -> Measured:
    """Norms alone, a scaler's factor taken off."""
    return Measured(norms=norms if scale is None else norms / scale, rows=rows)


def weighted_head_gradients(
    per_task: Sequence[dict[Tensor, Tensor]], weights: Tensor | None, outer: Tensor
) -> dict[Tensor, Tensor]:
    """Sum the tasks' gradients of the parameters above the cut, each times its weight (None: 1) and ``outer``."""
    total: dict[Tensor, Tensor] = {}
    factors = [outer] * len(per_task) if weights is None else (outer * weights).unbind()
    for factor, gradients in zip(factors, per_task, strict=True):
        if gradients:
            add_gradients(total, gradients, torch._foreach_mul(list(gradients.values()), factor))
    return total


def add_gradients(
    total: dict[Tensor, Tensor], parameters: Sequence[Tensor] | dict[Tensor, Tensor], gradients: Sequence[Tensor]
) -> None:
    """Add gradients, one a parameter, to what each parameter has."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        total[parameter] = total[parameter] + gradient if parameter in total else gradient
