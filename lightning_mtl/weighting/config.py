"""ConFIG takes the direction at equal angles to all gradients, as long as they agree."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.method.base import NEGLIGIBLE, Measure, Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import equal_projection_weights


def config_weights(gramian: Tensor) -> Tensor:
    r"""Compute the weights of :math:`\big( \sum_i g_i \cdot \hat u \big) \hat u` with :math:`u = U^{+} \mathbf{1}`.

    Args:
        gramian: ``[K, K]``.

    Returns:
        ``[K]``, float64, on the CPU, of either sign; all 0 where u is 0.

    Example:
        >>> config_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([1.2265, 0.8441], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double().numpy()
    weights = equal_projection_weights(G)
    products = G @ weights
    square = products @ weights
    return torch.from_numpy(weights * (products.sum() / square) if square > 0 else np.zeros_like(weights))


class ConFIG(Weighting):
    r"""Step at equal angles to all gradients, by the sum of their projections: conflict-free inverse gradients.

    .. math:: u = U^{+} \mathbf{1}, \qquad d = \Big( \sum_k g_k \cdot \hat u \Big) \hat u

    with U the unit gradients as rows. For independent gradients no task is in conflict with d. Heads follow their own,
    unweighted losses.

    When: gradients of very unlike length that conflict, as those of physics-informed losses do.

    Args:
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Source: Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, 2024,
    arXiv:2408.11104, equation 2.

    Deviations: the pseudo-inverse is taken of the K x K cosines, in float64; eigenvalues below 1e-7 of the largest
    count as 0. Opposite gradients, which leave no direction, give weights of 0.

    Example:
        >>> ConFIG(every_n_steps=4).every_n_steps
        4
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    negligible = NEGLIGIBLE
    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        return config_weights(self.needed(signals, "gramian"))
