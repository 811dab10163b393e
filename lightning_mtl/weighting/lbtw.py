"""LBTW weighs by how much of its first loss each task has left."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals

# A first loss that is next to nothing would make of a later one a weight that no number stands for.
LARGEST = 1e30


def lbtw_weights(losses: Tensor, first_losses: Tensor, alpha: float) -> Tensor:
    """Compute ``(L_k / L_k(0)) ** alpha``, ``[K]``; a first loss of 0 gives weight 1.

    Example:
        >>> lbtw_weights(torch.tensor([0.25, 2.0]), torch.tensor([1.0, 2.0]), alpha=0.5)
        tensor([0.5000, 1.0000])
    """
    ratios = torch.where(first_losses > 0, losses / first_losses, torch.ones_like(losses))
    return (ratios.clamp(min=0) ** alpha).clamp(max=LARGEST)


class LBTW(Weighting):
    r"""Weigh each task by the share of its first loss that is left: loss-balanced task weighting.

    .. math:: w_k = \left( \frac{L_k(t)}{L_k(0)} \right)^\alpha

    Tasks that learn fast lose weight, so that they do not drown the others.

    When: one task learns faster than the others and then disturbs them: what has been learned steps back.

    Args:
        alpha: How strongly; 0 means equal weights. The paper tries 0.1 and 0.5.
        reference: What L_k(0) is: the loss of the first batch of each ``"epoch"``, as in the paper's algorithm, or of
            the whole ``"training"``.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu, Liang and Gitter, Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning, AAAI
    2019.

    Deviations: the authors' code rescales the weights to Σ w = K; the paper's algorithm, followed here, does not. With
    gradient accumulation the first micro-batch gives the ratio, and L_k(0) is the first window's mean.

    Example:
        >>> LBTW(alpha=0.5).reference
        'epoch'
    """

    search_space: ClassVar[SearchSpace] = {"alpha": Range(0.1, 1.0)}

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        reference: Literal["epoch", "training"] = "epoch",
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(**common)
        if alpha < 0:
            raise ValueError(f"LBTW(alpha={alpha}) must be at least 0.")
        if reference not in ("epoch", "training"):
            raise ValueError(f"LBTW(reference={reference!r}) must be 'epoch' or 'training'.")
        self.alpha, self.reference = alpha, reference
        self.add_state("first_losses", torch.tensor(torch.nan))
        self.add_state("epoch", torch.tensor(-1))
        self.first_losses: Tensor
        self.epoch: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by what is left of the first losses."""
        return lbtw_weights(signals.losses, self._first(signals), self.alpha)

    def update(self, signals: Signals) -> None:
        """Remember the first losses."""
        self.first_losses = self._first(signals)
        self.epoch = torch.full_like(self.epoch, signals.epoch)

    def _first(self, signals: Signals) -> Tensor:
        unknown = self.first_losses.isnan()
        if self.reference == "epoch":
            unknown = unknown | (self.epoch != signals.epoch)
        return torch.where(unknown, signals.losses.to(self.first_losses), self.first_losses)
