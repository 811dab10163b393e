"""IMTL-G gives the step the same projection on every task's gradient."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.method.base import NEGLIGIBLE, Measure, Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import equal_projection_weights, min_norm_weights

# Relative to the weights' absolute values.
SMALLEST_SUM = 1e-6


def imtlg_weights(gramian: Tensor) -> Tensor:
    r"""Compute w with Σ w = 1 and :math:`\sum_j w_j g_j` projecting equally on all unit gradients.

    Args:
        gramian: ``[K, K]``.

    Returns:
        ``[K]``, float64, on the CPU, of either sign.

    Example:
        >>> imtlg_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.5923, 0.4077], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double().numpy()
    weights = equal_projection_weights(G)
    if weights.sum() <= SMALLEST_SUM * np.abs(weights).sum():
        weights = min_norm_weights(G)
    return torch.from_numpy(weights / weights.sum())


class IMTLG(Weighting):
    r"""Weigh tasks so that the shared step has the same projection on each unit gradient: impartial gradient balance.

    .. math:: d = \sum_k w_k g_k, \qquad d \cdot \hat g_1 = \dots = d \cdot \hat g_K, \qquad \sum_k w_k = 1

    in closed form. Weights may be negative. Heads follow their own, unweighted losses.

    When: gradients that conflict and are of unlike length.

    Args:
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, section 3.1.

    Deviations: the paper's algorithm takes gradients of the shared feature, which is ``at="features"``; the default
    here is all shared parameters. The paper inverts a matrix that is singular for parallel gradients; here a
    pseudo-inverse gives each of them its share. Where equal projections would be negative, an ascent, or do not exist,
    as for opposite gradients, the weights are those of the minimum-norm point.

    Example:
        >>> IMTLG(at="features").at
        'features'
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    negligible = NEGLIGIBLE
    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        return imtlg_weights(self.needed(signals, "gramian"))
