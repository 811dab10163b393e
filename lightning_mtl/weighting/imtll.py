"""Learned weights that bring all losses to the same scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers.adam import AdamState, adam_step

# A loss that stays 0 would let its scale grow without end; e^30 is beyond any scale in use, and finite.
MOST_EXTREME = 30.0


def imtll_gradient(log_scales: Tensor, losses: Tensor) -> Tensor:
    r"""Compute the derivative of :math:`\sum_k e^{s_k} L_k - s_k` by each s, ``[K]``.

    Example:
        >>> imtll_gradient(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor([0., 2.])
    """
    return torch.exp(log_scales) * losses - 1


def learn_scales(log_scales: Tensor, losses: Tensor, adam: AdamState, lr: float) -> tuple[Tensor, AdamState]:
    """Take one Adam step on the scales, kept within bounds; return them and the new state.

    Example:
        >>> zero = torch.zeros(2)
        >>> learn_scales(zero, torch.tensor([3.0, 0.5]), AdamState(zero, zero, zero), lr=0.1)[0]
        tensor([-0.1000,  0.1000])
    """
    moved, adam = adam_step(log_scales, imtll_gradient(log_scales, losses.to(log_scales)), adam, lr=lr)
    return moved.clamp(-MOST_EXTREME, MOST_EXTREME), adam


class IMTLL(Weighting):
    r"""Learn a scale for each loss, so that all scaled losses come near 1: the loss balance of impartial learning.

    .. math:: \min_{\theta, s} \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k}, \quad s = 0 \text{ at the start}

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
        super().__init__(**common)
        if not lr > 0:
            raise ValueError(f"IMTLL(lr={lr}) must be above 0.")
        self.lr = lr
        for name in ("log_scales", "mean", "spread", "steps"):
            self.add_state(name, torch.tensor(0.0))
        self.log_scales: Tensor
        self.mean: Tensor
        self.spread: Tensor
        self.steps: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the scales learned so far."""
        return torch.exp(self.log_scales)

    def update(self, signals: Signals) -> None:
        """Take one Adam step on the scales."""
        adam = AdamState(self.mean, self.spread, self.steps)
        self.log_scales, (self.mean, self.spread, self.steps) = learn_scales(
            self.log_scales, signals.losses, adam, self.lr
        )
