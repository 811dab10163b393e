"""FairGrad gives each task its alpha-fair share of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import alpha_fair_weights
from lightning_mtl.weighting.nash_mtl import Bargaining, bounded, combined_norm

# The shared step's length, relative to Nash-MTL's √K, from which on the user hears of it.
LONG = 100.0


def fairgrad_weights(
    gramian: Tensor, alpha: float, max_norm: float | None = None, preference: Tensor | None = None
) -> tuple[Tensor, bool]:
    r"""Solve :math:`G w = (p / w)^{1 / \alpha}`, elementwise, for positive w.

    Args:
        gramian: ``[K, K]``.
        alpha: Fairness.
        max_norm: Scale w so that the combined gradient is at most this long.
        preference: p, ``[K]``; None for ones.

    Returns:
        ``[K]``, float64, on the CPU; and whether the point is Pareto stationary, where w does not exist and the
        minimum-norm weights take its place.

    Example:
        >>> fairgrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), alpha=2.0)
        (tensor([0.4714, 0.3195], dtype=torch.float64), False)
    """
    G = gramian.detach().cpu().double()
    solution = alpha_fair_weights(G.numpy(), alpha, preference)
    return bounded(torch.from_numpy(solution.weights), G, max_norm), solution.stationary


class FairGrad(Bargaining):
    r"""Share the step among the tasks fairly, in the sense of alpha-fairness.

    .. math:: \max_d \sum_k p_k \frac{(g_k \cdot d)^{1 - \alpha}}{1 - \alpha} \text{ in a ball}, \qquad
        d = \sum_k w_k g_k, \qquad G w = (p / w)^{1 / \alpha}

    solved exactly, by Newton's method on its convex form. α = 1 is Nash-MTL, larger ones care more for the task that
    improves least. Heads follow their own, unweighted losses.

    With α other than 1 the shared step's length depends on the gradients': of all gradients times s, the step is
    :math:`s^{(1 - \alpha) / (1 + \alpha)}` times as long. So with α above 1 it grows without bound as gradients shrink,
    and with it where one of them is much shorter than the others.

    When: a choice between the sum of the losses (α near 0) and the worst task (large α).

    Args:
        alpha: α; the paper tries 1 to 10, most often 2.
        max_norm: Scale the weights so that the shared gradient is at most this long, as the official code does at 1;
            None leaves its length. A warning says, once, where it is more than 100 √K.
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the mean 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Attributes:
        stationary_steps: Steps taken at Pareto-stationary points, with the minimum-norm weights.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``preference`` names an unknown task.

    Source: Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024, arXiv:2402.15638, section 4.

    Deviations: the official code solves the equation by a bounded least-squares search, which ends near it; here it is
    solved exactly. The code multiplies the shared gradient by K and clips it to norm 1; so does this class with
    ``max_norm=1.0``, but for the factor, which matters only below that norm. It leaves the heads unweighted, as here;
    LibMTL's port weighs them. Preferences are not in the paper. A gradient below 1e-5 of the longest counts as zero.

    Example:
        >>> FairGrad(alpha=2.0, max_norm=1.0).alpha
        2.0
    """

    search_space: ClassVar[SearchSpace] = {
        "alpha": Range(0.5, 5.0, log=True),
        "max_norm": Choice((None, 1.0)),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self,
        alpha: float = 1.0,
        max_norm: float | None = None,
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(max_norm, preference=preference, **common)
        if not 0 < alpha < math.inf:
            raise ValueError(f"FairGrad(alpha={alpha}) must be above 0 and finite.")
        self.alpha = alpha
        self._warned = False

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        G = self.needed(signals, "gramian")
        weights, self.stationary = fairgrad_weights(G, self.alpha, self.max_norm, self.factors(signals))
        if not self._warned and self.max_norm is None:
            self._warn_if_long(combined_norm(weights, G.cpu().double()), signals)
        return weights

    def _warn_if_long(self, length: float, signals: Signals) -> None:
        if length > LONG * signals.num_tasks**0.5:
            self._warned = True
            rank_zero_warn(
                f"FairGrad(alpha={self.alpha}) makes the shared gradient {length:.3g} long at step {signals.step}, for "
                "gradients are short or their lengths far apart; pass max_norm=1.0 to bound it, as the official code "
                "does."
            )
