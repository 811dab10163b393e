"""GLS descends the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, Outgrown, check_loss_floor


def gls_weights(losses: Tensor, loss_floor: float = LOSS_FLOOR) -> Tensor:
    r"""Compute the derivative of :math:`(\prod_k L_k)^{1/K}` by each loss, ``[K]``; losses of 0 are left out.

    Losses between 0 and the floor count as the floor.

    Example:
        >>> gls_weights(torch.tensor([0.5, 2.0, 1.0]))
        tensor([0.6667, 0.1667, 0.3333])
    """
    positive = losses > 0
    count = positive.sum().clamp(min=1)
    logarithms = torch.where(positive, losses.clamp(min=loss_floor), torch.ones_like(losses)).log()
    relative = torch.exp(logarithms.sum() / count - logarithms) / count
    return torch.where(positive, relative, torch.zeros_like(relative))


class GLS(Weighting):
    r"""Descend the geometric mean of the losses: geometric loss strategy.

    .. math:: \min_\theta \Big( \prod_k L_k \Big)^{1 / K}, \qquad
        w_k = \frac{1}{K L_k} \Big( \prod_j L_j \Big)^{1 / K}

    A loss in other units changes the length of the step and no more. Losses must not be negative. The smaller one of
    them is, the shorter are the other tasks' steps. A warning says, once, which task's weight is more than 1e4 times
    the median of the others'.

    When: positive losses of unlike scale; nothing to tune.

    Args:
        loss_floor: A loss below this counts as this large, so that a learned task does not stop the others; it changes
            nothing above.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Chennupati et al., MultiNet++, 2019, arXiv:1904.08492, section 3.2.

    Deviations: the paper has no floor; a loss of 0 is left out of the mean, whose derivative it would make infinite.
    With gradient accumulation the first micro-batch gives the weights.

    Example:
        >>> GLS(total=3.0).total
        3.0
    """

    takes_logarithms = True

    def __init__(self, *, loss_floor: float = LOSS_FLOOR, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)
        self.loss_floor = check_loss_floor("GLS", loss_floor)
        self.outgrown = Outgrown("GLS", "Raise loss_floor to bound the weight")

    def weigh(self, signals: Signals) -> Tensor:
        """Differentiate the geometric mean at this step's losses."""
        weights = gls_weights(signals.losses, self.loss_floor)
        self.outgrown.look(weights, signals)
        return weights
