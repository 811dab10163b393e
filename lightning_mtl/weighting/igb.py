"""IGB weighs by the gap that each task has left to improve."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, Outgrown, check_loss_floor
from lightning_mtl.weighting.scale_invariant import scale_invariant_weights


def igb_weights(losses: Tensor, base_losses: Tensor, loss_floor: float = LOSS_FLOOR) -> Tensor:
    r"""Compute :math:`K \operatorname{softmax}_k(L_k / \bar L_k) / L_k`, ``[K]``.

    Args:
        losses: L, ``[K]``.
        base_losses: :math:`\bar L`, ``[K]``; where it is not known, nan, the quotient is 1.
        loss_floor: The least loss to divide by.

    Example:
        >>> igb_weights(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.0]))
        tensor([1.5102, 0.6225])
    """
    ratios = torch.where(base_losses > 0, losses / base_losses, torch.ones_like(losses))
    gaps = len(losses) * ratios.softmax(0)
    return gaps * scale_invariant_weights(losses, loss_floor)


class IGB(Weighting):
    r"""Descend the losses' logarithms, weighted by the share of the first epoch's loss that is left: IGBv1.

    .. math:: \sum_k c_k \log L_k, \qquad w_k = \frac{c_k}{L_k}, \qquad
        c_k = K \operatorname{softmax}_k\!\left( \frac{L_k}{\bar L_k} \right)

    with :math:`\bar L_k` the mean loss of a task's first epoch, the mean of its optimizer steps; in that epoch c = 1.
    The less a task has improved since, the larger its share. Losses must not be negative. A warning says, once, which
    task's weight is more than 1e4 times the median of the others'.

    When: losses of unlike scale, some of which the first epoch leaves far from 0.

    Args:
        loss_floor: A loss below this has the weight of one that is this large; it changes nothing above.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`. Epochs count
            from ``start_step``.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Dai, Fei and Lu, Improvable Gap Balancing for Multi-Task Learning, UAI 2023, arXiv:2307.15429, section 3.2.

    Deviations: the second algorithm of the paper, IGBv2, learns the shares by reinforcement learning and is not
    offered. The code lets another epoch's mean be chosen, and has no floor. With gradient accumulation the first
    micro-batch gives the weights.

    Example:
        >>> IGB(start_step=10).takes_logarithms
        True
    """

    takes_logarithms = True

    def __init__(self, *, loss_floor: float = LOSS_FLOOR, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)
        self.loss_floor = check_loss_floor("IGB", loss_floor)
        self.outgrown = Outgrown("IGB", "Raise loss_floor to bound the weight")
        self.add_state("mean_loss", torch.tensor(torch.nan))
        self.add_state("count", torch.tensor(0))
        self.add_state("epoch", torch.tensor(-1))  # the first one that the task takes part in
        self.mean_loss: Tensor
        self.count: Tensor
        self.epoch: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by this step's losses, relative to the first epoch's."""
        ended = (self.count > 0) & (self.epoch != signals.epoch)
        base = torch.where(ended, self.mean_loss, torch.nan).to(signals.losses)
        weights = igb_weights(signals.losses, base, self.loss_floor)
        self.outgrown.look(weights, signals)
        return weights

    def update(self, signals: Signals) -> None:
        """Take the losses of a task's first epoch into its mean."""
        self.epoch = torch.where(self.epoch < 0, signals.epoch, self.epoch)
        taken = self.epoch == signals.epoch
        self.count = self.count + taken
        before = self.mean_loss.nan_to_num(0.0)
        moved = before + (signals.losses.to(before) - before) / self.count
        self.mean_loss = torch.where(taken, moved, self.mean_loss)
