"""CoVWeighting weighs by how much each loss still varies, relative to its mean."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals

EPS = 1e-8
# A loss may grow from next to nothing by more than its square can be written.
LARGEST_RATIO = 1e15


def cov_weights(mean: Tensor, variance: Tensor) -> Tensor:
    """Compute coefficients of variation, standard deviation by mean, scaled to the sum 1; all ``[K]``.

    Example:
        >>> cov_weights(torch.tensor([1.0, 2.0]), torch.tensor([0.01, 0.01]))
        tensor([0.6667, 0.3333])
    """
    coefficients = torch.sqrt(variance + EPS) / mean
    return coefficients / coefficients.sum()


class CoVWeighting(Weighting):
    r"""Weigh each loss by the coefficient of variation of its loss ratios.

    .. math:: w_k = \frac{c_k}{\sum_j c_j}, \qquad c_k = \frac{\sigma(\ell_k)}{\mu(\ell_k)}, \qquad
        \ell_k(t) = \frac{L_k(t)}{\mu(L_k)(t - 1)}

    with means μ and deviations σ over all steps so far. A loss that has stopped changing is as good as it gets and
    loses weight. The weights sum to 1, and are 1 / K as long as a present task has had fewer than two steps.

    When: some losses have settled while others still vary; nothing to tune.

    Args:
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`. The statistics
            begin at ``start_step``.

    Source: Groenendijk et al., Multi-Loss Weighting with Coefficient of Variations, 2020, arXiv:2009.01717, section 3.

    Deviations: as in the official code the weights of a step come from the steps before it, and 1e-8 is added to the
    variance. The code's decaying means are not offered.

    Example:
        >>> CoVWeighting(start_step=10).start_step
        10
    """

    reads_losses: ClassVar[bool] = False

    def __init__(self, **common: Unpack[CommonArguments]) -> None:
        super().__init__(**common)
        for name in ("mean_loss", "mean_ratio", "squares", "count"):
            self.add_state(name, torch.tensor(0.0))
        self.mean_loss: Tensor
        self.mean_ratio: Tensor
        self.squares: Tensor
        self.count: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the ratios of the steps so far."""
        count = self.count.clamp(min=1)
        weights = cov_weights(torch.where(self.count > 0, self.mean_ratio, count), self.squares / count)
        return torch.where((self.count < 2).any(), torch.full_like(weights, 1 / signals.num_tasks), weights)

    def update(self, signals: Signals) -> None:
        """Take the step's losses into the running means and the sum of squares, by Welford's method."""
        losses = signals.losses.to(self.mean_loss)
        known = (self.count > 0) & (self.mean_loss != 0)
        ratios = torch.where(known, losses / self.mean_loss, torch.ones_like(losses))
        ratios = ratios.clamp(-LARGEST_RATIO, LARGEST_RATIO)
        self.count = self.count + 1
        before = self.mean_ratio
        self.mean_ratio = before + (ratios - before) / self.count
        self.squares = self.squares + (ratios - before) * (ratios - self.mean_ratio)
        self.mean_loss = self.mean_loss + (losses - self.mean_loss) / self.count
