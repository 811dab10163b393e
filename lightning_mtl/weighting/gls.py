"""GLS descends the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals


def gls_weights(losses: Tensor) -> Tensor:
    r"""Compute the derivative of :math:`(\prod_k L_k)^{1/K}` by each loss, ``[K]``; losses of 0 are left out.

    Example:
        >>> gls_weights(torch.tensor([0.5, 2.0, 1.0]))
        tensor([0.6667, 0.1667, 0.3333])
    """
    positive = losses > 0
    count = positive.sum().clamp(min=1)
    logarithms = torch.where(positive, losses, torch.ones_like(losses)).log()
    relative = torch.exp(logarithms.sum() / count - logarithms) / count
    return torch.where(positive, relative, torch.zeros_like(relative))


class GLS(Weighting):
    r"""Descend the geometric mean of the losses: geometric loss strategy.

    .. math:: \min_\theta \Big( \prod_k L_k \Big)^{1 / K}, \qquad
        w_k = \frac{1}{K L_k} \Big( \prod_j L_j \Big)^{1 / K}

    A loss in other units changes the length of the step and no more. Losses must not be negative.

    Args:
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Source: Chennupati et al., MultiNet++, 2019, arXiv:1904.08492, section 3.2.

    Deviations: a loss of 0 is left out of the mean, whose derivative it would make infinite. With gradient accumulation
    the first micro-batch gives the weights.

    Example:
        >>> GLS(total=3.0).total
        3.0
    """

    takes_logarithms = True

    def __init__(self, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)

    def weigh(self, signals: Signals) -> Tensor:
        """Differentiate the geometric mean at this step's losses."""
        return gls_weights(signals.losses)
