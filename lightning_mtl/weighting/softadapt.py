"""SoftAdapt gives more weight to the losses that fall slower."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals


def softadapt_weights(slopes: Tensor, beta: float, losses: Tensor | None = None, *, normalized: bool = False) -> Tensor:
    r"""Compute the softmax of :math:`\beta s`, each term times its loss where losses are given, ``[K]``.

    Args:
        slopes: s, ``[K]``.
        beta: β.
        losses: ``[K]``, not negative; None leaves them out.
        normalized: Whether the slopes are divided by the sum of their absolute values.

    Example:
        >>> softadapt_weights(torch.tensor([-1.0, -1.0]), 0.1, torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    if normalized:
        size = slopes.abs().sum()
        slopes = torch.where(size > 0, slopes / size, torch.zeros_like(slopes))
    weights = (beta * slopes).softmax(0)
    if losses is None:
        return weights
    weighted = weights * (losses.clamp(min=0) / losses.max())
    total = weighted.sum()
    return torch.where(total > 0, weighted / total, weights)


class SoftAdapt(Weighting):
    r"""Weigh by the softmax of how each loss has changed since the step before: the slowest gets the most.

    .. math:: w_k = \frac{c_k \, e^{\beta s_k}}{\sum_j c_j \, e^{\beta s_j}}, \qquad s_k = L_k(t) - L_k(t - 1)

    with :math:`c_k = 1`, or with ``loss_weighted`` the mean of the two losses; with ``normalized`` the slopes are
    divided by :math:`\sum_j |s_j|`, so that β means the same whatever the losses' units. The weights sum to 1. A task
    without a step before has slope 0; without any, all weights are 1 / K.

    When: all losses are of one unit and some have stopped falling; it costs nothing.

    Args:
        beta: β; above 0 the worst performing losses get more, below 0 the best.
        loss_weighted: Whether a larger loss gets more. A negative loss counts as 0.
        normalized: Whether slopes are relative to each other.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Heydari, Thompson and Mehmood, SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
    Multi-Part Loss Functions, 2019, arXiv:1912.12355, section 3.

    Deviations: the slope is the difference of two steps, which is the official code's with ``accuracy_order=1``; with
    more points that code takes the derivative at the oldest of them. Its normalized slopes are divided by their plain
    sum, which turns their signs where most losses fall, and explodes where they cancel.

    Example:
        >>> SoftAdapt(beta=0.5, normalized=True).beta
        0.5
    """

    search_space: ClassVar[SearchSpace] = {
        "beta": Range(1e-2, 10.0, log=True),
        "loss_weighted": Choice((False, True)),
        "normalized": Choice((False, True)),
    }

    def __init__(
        self,
        beta: float = 0.1,
        *,
        loss_weighted: bool = False,
        normalized: bool = False,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(**common)
        if not math.isfinite(beta):
            raise ValueError(f"SoftAdapt(beta={beta}) must be finite.")
        self.beta, self.loss_weighted, self.normalized = beta, loss_weighted, normalized
        self.add_state("last", torch.tensor(torch.nan))
        self.last: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by this step's losses beside the last one's."""
        known = ~self.last.isnan()
        before = torch.where(known, self.last.to(signals.losses), signals.losses)
        means = (signals.losses / 2 + before / 2) if self.loss_weighted else None
        weights = softadapt_weights(signals.losses - before, self.beta, means, normalized=self.normalized)
        return torch.where(known.any(), weights, torch.full_like(weights, 1 / signals.num_tasks))

    def update(self, signals: Signals) -> None:
        """Keep the losses."""
        self.last = signals.losses
