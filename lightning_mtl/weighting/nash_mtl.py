"""Nash-MTL weighs by the Nash bargaining solution among the tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import alpha_fair_weights
from lightning_mtl.weighting.loss_floor import Outgrown
from lightning_mtl.weighting.preference import Preferring


def nash_mtl_weights(
    gramian: Tensor, max_norm: float | None = None, preference: Tensor | None = None
) -> tuple[Tensor, bool]:
    r"""Solve :math:`G \alpha = p / \alpha`, elementwise, for positive α.

    Args:
        gramian: ``[K, K]``.
        max_norm: Scale α so that the combined gradient, √(Σ p) long otherwise, is at most this long.
        preference: p, ``[K]``; None for ones.

    Returns:
        ``[K]``, float64, on the CPU; and whether the point is Pareto stationary, where α does not exist and the
        minimum-norm weights take its place.

    Example:
        >>> nash_mtl_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        (tensor([0.5915, 0.4071], dtype=torch.float64), False)
    """
    G = gramian.detach().cpu().double()
    solution = alpha_fair_weights(G.numpy(), preference=preference)
    return bounded(torch.from_numpy(solution.weights), G, max_norm), solution.stationary


def combined_norm(weights: Tensor, gramian: Tensor) -> float:
    """How long the combined gradient is."""
    return math.sqrt(max(float(weights @ gramian @ weights), 0.0))  # rounding may take the square below zero


def bounded(weights: Tensor, gramian: Tensor, max_norm: float | None) -> Tensor:
    """Scale weights so that the combined gradient is at most this long; None leaves them.

    Example:
        >>> bounded(torch.ones(2), torch.diag(torch.tensor([9.0, 16.0])), max_norm=1.0)
        tensor([0.2000, 0.2000])
    """
    if max_norm is None:
        return weights
    length = combined_norm(weights, gramian)
    return weights * min(1.0, max_norm / length) if length > 0 else weights


class Bargaining(Preferring):
    """The base of methods whose weights do not exist at Pareto-stationary points, and are minimum-norm weights there.

    A subclass keeps in ``stationary`` whether the step that it weighs is taken at such a point.

    Args:
        max_norm: Scale the weights so that the shared gradient is at most this long; None leaves its length.
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the mean 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Attributes:
        stationary_steps: Steps taken at Pareto-stationary points.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(preference=preference, **common)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{type(self).__name__}(max_norm={max_norm}) must be above 0; None leaves the length.")
        self.max_norm = max_norm
        self.outgrown = Outgrown(
            type(self).__name__, "Its head's steps are scaled alike: leave the task out, or scale its loss"
        )
        self.add_state("stationary_steps", torch.tensor(0), per_task=False)
        self.stationary_steps: Tensor
        self.stationary = False

    def factors(self, signals: Signals) -> Tensor | None:
        """The factors of the present tasks' utilities, ``[K]``, of mean 1; None for ones."""
        return self.on_the_simplex(signals) * signals.num_tasks if self.preference else None

    def update(self, signals: Signals) -> None:
        """Count the step if there was nothing to bargain about."""
        self.stationary_steps = self.stationary_steps + int(self.stationary)
        self.stationary = False


class NashMTL(Bargaining):
    r"""Weigh tasks by the Nash bargaining solution: no task can gain a share that others lose less than.

    .. math:: \max_d \sum_k p_k \log (g_k \cdot d) \text{ in a ball}, \qquad d = \sum_k \alpha_k g_k, \qquad
        G \alpha = p / \alpha

    solved exactly, by Newton's method on its convex form. The shared step has length √K whatever the gradients are, so
    that a clip at norm 1 always clips. The weights scale the heads, too. They grow as a gradient vanishes, up to
    :attr:`negligible`, where the task takes no part any more; a warning says, once, which task's weight is more than
    1e4 times the median of the others'.

    When: gradients that conflict and losses in unlike units, which do not matter to it.

    Args:
        max_norm: Scale the weights so that the shared gradient is at most this long; None leaves √K.
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the mean 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`. For ``every_n_steps`` the paper tries 1 to 100.

    Attributes:
        stationary_steps: Steps taken at Pareto-stationary points, with the minimum-norm weights.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``preference`` names an unknown task.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, 2022, arXiv:2202.01017, equation 2.

    Deviations: the official code approximates α by up to 20 conic programs, begins each with the last α, and keeps that
    without notice where the solver fails. Preferences are those of an asymmetric bargain, the paper has p = 1. A
    gradient below 1e-5 of the longest counts as zero. The code also clips the shared gradient at norm 1 by default, and
    not the heads', while ``max_norm`` scales both.

    Example:
        >>> NashMTL(max_norm=1.0, every_n_steps=10).weighs_heads
        True
    """

    weighs_heads: ClassVar[bool] = True
    search_space: ClassVar[SearchSpace] = {
        "max_norm": Choice((None, 1.0)),
        "at": Choice(("trunk", "features")),
    }

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        G = self.needed(signals, "gramian")
        weights, self.stationary = nash_mtl_weights(G, self.max_norm, self.factors(signals))
        self.outgrown.look(weights, signals)
        return weights
