"""CRMOGM takes the running mean of another method's weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.wrapper import Wrapper


def crmogm_weights(average: Tensor, newest: Tensor, alpha: float) -> Tensor:
    """Compute ``alpha * average + (1 - alpha) * newest``, ``[K]``; the newest alone where there is no average, nan.

    Example:
        >>> crmogm_weights(torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 3.0]), alpha=0.9)
        tensor([1.1000, 3.0000])
    """
    return torch.where(average.isnan(), newest, torch.lerp(newest, average, alpha))


class CRMOGM(Wrapper):
    r"""Smooth the weights of any other method over the steps, which makes them depend less on the batch.

    .. math:: w(t) = \alpha \, w(t - 1) + (1 - \alpha) \, \hat w(t), \qquad w(1) = \hat w(1)

    with :math:`\hat w` the wrapped method's weights, a task's first being those of its first step. What is measured,
    where, how often, and whether heads are weighted, is the wrapped method's affair. Lightning's hooks reach it as if
    the Trainer held it, and its state is saved and restored with this one's.

    When: small or noisy batches make another method's weights jump.

    Args:
        weighting: The method to smooth, constructed without ``importance``, ``start_step`` and ``total``.
        alpha: α; 0 changes nothing.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``alpha`` is out of its range, or ``weighting`` has an argument that belongs here.
        TypeError: If ``weighting`` is no weighting, or finds its weights from whole gradients or none at all.

    Source: Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS
    2022, algorithm 1.

    Deviations: α is constant; the paper's theory lets it grow toward 1 as the learning rate falls.

    Example:
        >>> from lightning_mtl.weighting import MGDA
        >>> CRMOGM(MGDA(at="features"), alpha=0.9).at
        'features'
    """

    search_space: ClassVar[SearchSpace] = {"alpha": Range(0.5, 0.99)}

    def __init__(self, weighting: Weighting, alpha: float = 0.9, **common: Unpack[CommonArguments]) -> None:
        super().__init__(weighting, **common)
        if not 0 <= alpha < 1:
            raise ValueError(f"CRMOGM(alpha={alpha}) must be at least 0 and below 1.")
        self.alpha = alpha
        self.add_state("average", torch.tensor(torch.nan))
        self.average: Tensor
        self._coming: tuple[int, Tensor] | None = None  # the step, and what becomes the average if it is taken

    def weigh(self, signals: Signals) -> Tensor:
        """Mix the wrapped method's weights into the mean."""
        newest = self.newest(signals)
        weights = crmogm_weights(self.average.to(newest), newest, self.alpha)
        self._coming = signals.step, weights
        return weights

    def update(self, signals: Signals) -> None:
        """Keep the mean, and let the wrapped method update its state."""
        if self._coming is not None and self._coming[0] == signals.step:  # not one that was skipped
            self.average = self._coming[1]
        super().update(signals)
