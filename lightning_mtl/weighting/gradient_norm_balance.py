"""GradientNormBalance weighs inversely to the tasks' gradient norms."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import NEGLIGIBLE, Measure, Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals


def inverse_norm_weights(norms: Tensor, importance: Tensor, eps: float) -> Tensor:
    r"""Compute :math:`w_k \propto \iota_k / (n_k + \epsilon \bar n)` with Σ w = K; all ``[K]``.

    Example:
        >>> inverse_norm_weights(torch.tensor([1.0, 3.0]), torch.ones(2), eps=0.0)
        tensor([1.5000, 0.5000])
    """
    mean = norms.mean()
    inverse = importance / torch.where(mean > 0, norms + eps * mean, torch.ones_like(norms))
    return norms.numel() * inverse / inverse.sum()


class GradientNormBalance(Weighting):
    r"""Weigh each task by the inverse of its gradient norm, so that large gradients take small steps.

    .. math:: w_k = \frac{K v_k}{\sum_j v_j}, \qquad v_k = \frac{\iota_k}{\lVert g_k \rVert + \epsilon \bar n}

    with :math:`\bar n` the mean norm and :math:`\iota_k` the importance. The weighted gradients then have norms in the
    ratio of the importances. A task whose gradient is short gets at most 1/ε times an average task's weight, and little
    is left for the others, because the sum is K. A task whose gradient is below 1e-5 of the longest takes no part.

    When: gradients of unlike length. It is the simplest cure, and cheap at the last layer.

    Args:
        eps: ε, relative to the mean norm.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`. ``at="last_layer"`` is the cheap choice; the importance is ι.

    Raises:
        ValueError: If an argument is out of its range.

    Source: GradNorm's balance of norms without its training rates; arXiv:2509.23915 proposes to scale by gradient
    norms.

    Example:
        >>> GradientNormBalance(at="last_layer").eps
        0.001
    """

    measures: ClassVar[Measure] = "norms"
    negligible = NEGLIGIBLE
    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def __init__(self, *, eps: float = 1e-3, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        if not eps > 0:
            raise ValueError(f"GradientNormBalance(eps={eps}) must be above 0.")
        self.eps = eps

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the inverse norms of this step."""
        return inverse_norm_weights(
            self.needed(signals, "norms"), torch.ones_like(self.needed(signals, "norms")), self.eps
        )

    def scaled(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Multiply by the importance and keep the sum K."""
        scaled = super().scaled(weights, importance)
        return scaled * (weights.sum() / scaled.sum())
