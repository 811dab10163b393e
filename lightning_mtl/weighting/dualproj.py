"""DualProj takes the mean gradient, freed from its conflicts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import project_on_dual_cone
from lightning_mtl.weighting.preference import Preferring


def dualproj_weights(gramian: Tensor, preference: Tensor) -> Tensor:
    r"""Compute :math:`\arg\min_{v \ge p} v^\top G v`.

    Args:
        gramian: ``[K, K]``.
        preference: p, ``[K]``.

    Returns:
        ``[K]``, float64, on the CPU, none below p.

    Example:
        >>> dualproj_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.6111, 0.5000], dtype=torch.float64)
    """
    return torch.from_numpy(project_on_dual_cone(gramian.detach().cpu().double().numpy(), preference.double().numpy()))


class DualProj(Preferring):
    r"""Project the mean gradient on the cone of directions that conflict with no task.

    .. math:: d = \arg\min_{y : J y \ge 0} \Big\lVert y - \sum_k p_k g_k \Big\rVert

    The projection is exact, by non-negative least squares on the K x K Gramian. Heads follow their own, unweighted
    losses.

    When: no step may go against any task, and the mean gradient is to be changed as little as possible.

    Args:
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the sum 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``preference`` is not positive, or at setup if it names an unknown task.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017, arXiv:1706.08840, section 3;
    among the tasks of one step: Quinton and Rey, 2024, arXiv:2406.16232.

    Deviations: the first paper projects the newest task's gradient off the conflicts with earlier tasks' and adds a
    margin; here the mean of all is projected, without one.

    Example:
        >>> DualProj(at="features").weighs_heads
        False
    """

    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def weigh(self, signals: Signals) -> Tensor:
        """Project this step's mean gradient."""
        return dualproj_weights(self.needed(signals, "gramian"), self.on_the_simplex(signals))
