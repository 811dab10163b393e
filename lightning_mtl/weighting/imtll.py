"""IMTL-L learns weights that bring all losses to the same scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.learned import LARGEST_LOGARITHM, Learned


def imtll_gradient(log_scales: Tensor, losses: Tensor) -> Tensor:
    r"""Compute the derivative of :math:`\sum_k e^{s_k} L_k - s_k` by each s, ``[K]``.

    Example:
        >>> imtll_gradient(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor([0., 2.])
    """
    return torch.exp(log_scales) * losses - 1


class IMTLL(Learned):
    r"""Learn a scale for each loss, so that all scaled losses come near 1: the loss balance of impartial learning.

    .. math:: \min_{\theta, s} \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k}, \quad s = 0 \text{ at the start}

    When: positive losses of unlike scale, whose scales may be learned over some hundred steps.

    Args:
        lr: Step size of the Adam that learns s.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, section 3.2.

    Deviations: the paper learns s with the network's optimizer, here it has an Adam of its own, so that a weight decay
    or a schedule of the network leaves it alone. The step uses s before its own update, as one joint step would.

    Example:
        >>> IMTLL(lr=0.05).lr
        0.05
    """

    reads_losses: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {"lr": Range(1e-3, 1e-1, log=True)}

    def __init__(self, *, lr: float = 0.01, **common: Unpack[CommonArguments]) -> None:
        super().__init__("log_scales", lr=lr, **common)
        self.log_scales: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the scales learned so far."""
        return torch.exp(self.log_scales)

    def update(self, signals: Signals) -> None:
        """Take one Adam step on the scales."""
        gradient = imtll_gradient(self.log_scales, signals.losses.to(self.log_scales))
        self.log_scales = self.descended(self.log_scales, gradient).clamp(-LARGEST_LOGARITHM, LARGEST_LOGARITHM)
