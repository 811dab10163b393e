"""SDMGrad takes the common descent direction of least norm near the mean gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import min_norm_weights
from lightning_mtl.weighting.preference import Preferring


def sdmgrad_weights(gramian: Tensor, preference: Tensor, lam: float) -> Tensor:
    r"""Compute :math:`(w + \lambda p) / (1 + \lambda)`, w minimizing :math:`\lVert J^\top (w + \lambda p) \rVert`.

    Args:
        gramian: ``[K, K]``.
        preference: p, ``[K]``, of sum 1.
        lam: λ.

    Returns:
        ``[K]``, float64, on the CPU, of sum 1.

    Example:
        >>> J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> sdmgrad_weights(J @ J.T, torch.full((2,), 0.5), lam=1.0)
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    p = preference.detach().cpu().double()
    # As Σ w = 1, w + λ p = (I + λ p 1ᵀ) w: the least norm of the gradients shifted by λ times the preferred one.
    shift = torch.eye(len(p), dtype=torch.float64) + lam * p[:, None]
    shifted = shift.T @ gramian.detach().cpu().double() @ shift
    # Where a shifted gradient cancels, rounding may leave a squared norm a little below 0.
    shifted.diagonal().clamp_(min=0.0)
    w = torch.from_numpy(min_norm_weights(shifted.numpy()))
    return (w + lam * p) / (1 + lam)


class SDMGrad(Preferring):
    r"""Take the shortest convex combination of the gradients, each moved toward the mean: direction-oriented descent.

    .. math:: w = \arg\min_{w \ge 0, \sum w = 1} \Big\lVert \sum_k (w_k + \lambda p_k) g_k \Big\rVert^2, \qquad
        d = \frac{1}{1 + \lambda} \sum_k (w_k + \lambda p_k) g_k

    solved exactly, as non-negative least squares on the K x K Gramian; p = 1 / K prefers the mean gradient. λ = 0 is
    MGDA, large values are the mean. Heads follow their own, unweighted losses. As with MGDA, one gradient that almost
    vanishes takes w for itself, and what is left of the others is their part in λ p; at exactly zero it takes no part.

    When: gradients conflict, and a compromise between ``MGDA`` and the mean gradient is wanted; ``lam`` says where.

    Args:
        lam: λ, not negative; the authors' experiments have 0.3.
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the sum 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``preference`` names an unknown task.

    Source: Xiao, Ban and Ji, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms,
    NeurIPS 2023, arXiv:2305.18409, section 4.

    Deviations: the paper moves w by a few steps of projected descent on products of two independent batches, and
    applies it to a third, for its proofs under noise; here w is exact for one batch, which is what its deterministic
    form converges to. The official code, too, keeps one batch's gradients only, begins each search at the last w,
    multiplies the shared gradient by K and clips it to norm 1.

    Example:
        >>> SDMGrad(lam=0.6, preference={"depth": 2.0}).lam
        0.6
    """

    negligible = 0.0
    search_space: ClassVar[SearchSpace] = {
        "lam": Range(0.1, 10.0, log=True),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self,
        lam: float = 0.3,
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(preference=preference, **common)
        if not 0 <= lam < math.inf:
            raise ValueError(f"SDMGrad(lam={lam}) must be at least 0 and finite.")
        self.lam = lam

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        return sdmgrad_weights(self.needed(signals, "gramian"), self.on_the_simplex(signals), self.lam)
