"""ScaleInvariant descends the sum of the losses' logarithms."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, Outgrown, check_loss_floor


def scale_invariant_weights(losses: Tensor, loss_floor: float = LOSS_FLOOR) -> Tensor:
    """Compute ``1 / max(L_k, floor)``, ``[K]``; 0 for a loss of 0.

    Example:
        >>> scale_invariant_weights(torch.tensor([0.5, 2.0, 0.0]))
        tensor([2.0000, 0.5000, 0.0000])
    """
    inverse = 1 / losses.clamp(min=loss_floor)
    return torch.where(losses > 0, inverse, torch.zeros_like(inverse))


class ScaleInvariant(Weighting):
    r"""Descend the sum of the losses' logarithms, so that their units do not matter: the scale-invariant baseline.

    .. math:: \min_\theta \sum_k \log L_k, \qquad w_k = 1 / L_k

    Losses must not be negative. A warning says, once, which task's weight is more than 1e4 times the median of the
    others'.

    When: positive losses in unlike or changing units. Any gap between units is bridged in the first step.

    Args:
        loss_floor: A loss below this has the weight of one that is this large, so that a learned task does not drown
            the others; it changes nothing above.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, 2022, arXiv:2202.01017, section 6.

    Deviations: the paper has no floor; a loss of 0, where the logarithm has no derivative, has weight 0. With gradient
    accumulation the first micro-batch gives the weights.

    Example:
        >>> ScaleInvariant(importance={"depth": 2.0}).importance
        {'depth': 2.0}
    """

    takes_logarithms = True

    def __init__(self, *, loss_floor: float = LOSS_FLOOR, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)
        self.loss_floor = check_loss_floor("ScaleInvariant", loss_floor)
        self.outgrown = Outgrown("ScaleInvariant", "Raise loss_floor to bound the weight")

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the inverse of this step's losses."""
        weights = scale_invariant_weights(signals.losses, self.loss_floor)
        self.outgrown.look(weights, signals)
        return weights
