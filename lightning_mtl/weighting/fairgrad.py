"""FairGrad gives each task its alpha-fair share of the step."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import alpha_fair_weights
from lightning_mtl.weighting.nash_mtl import Bargaining


def fairgrad_weights(gramian: Tensor, alpha: float) -> tuple[Tensor, bool]:
    r"""Solve :math:`G w = w^{-1 / \alpha}`, elementwise, for positive w.

    Args:
        gramian: ``[K, K]``.
        alpha: Fairness.

    Returns:
        ``[K]``, float64, on the CPU; and whether the point is Pareto stationary, where w does not exist and the
        minimum-norm weights take its place.

    Example:
        >>> fairgrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), alpha=2.0)
        (tensor([0.4714, 0.3195], dtype=torch.float64), False)
    """
    solution = alpha_fair_weights(gramian.detach().cpu().double().numpy(), alpha)
    return torch.from_numpy(solution.weights), solution.stationary


class FairGrad(Bargaining):
    r"""Share the step among the tasks fairly, in the sense of alpha-fairness.

    .. math:: \max_d \sum_k \frac{(g_k \cdot d)^{1 - \alpha}}{1 - \alpha} \text{ in a ball}, \qquad
        d = \sum_k w_k g_k, \qquad G w = w^{-1 / \alpha}

    solved exactly, by Newton's method on its convex form. α = 1 is Nash-MTL, larger ones care more for the task that
    improves least. Heads follow their own, unweighted losses.

    Args:
        alpha: α; the paper tries 1 to 10, most often 2.
        **common: ``importance``, ``start_step``, ``total``, ``at`` and ``every_n_steps``, as in
            :class:`~lightning_mtl.Weighting`.

    Attributes:
        stationary_steps: Steps taken at Pareto-stationary points, with the minimum-norm weights.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024, arXiv:2402.15638, section 4.

    Deviations: the official code solves the equation by a bounded least-squares search, which ends near it; here it is
    solved exactly. The code weighs the heads as well.

    Example:
        >>> FairGrad(alpha=2.0).alpha
        2.0
    """

    weighs_heads: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        "alpha": Range(0.5, 5.0, log=True),
        "at": Choice(("trunk", "features")),
    }

    def __init__(self, alpha: float = 1.0, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        if not 0 < alpha < math.inf:
            raise ValueError(f"FairGrad(alpha={alpha}) must be above 0 and finite.")
        self.alpha = alpha

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        weights, self.stationary = fairgrad_weights(self.needed(signals, "gramian"), self.alpha)
        return weights
