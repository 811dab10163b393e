"""UPGrad adds up the gradients, each freed from its conflicts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import project_rows_on_dual_cone
from lightning_mtl.weighting.preference import Preferring


def upgrad_weights(gramian: Tensor, preference: Tensor) -> Tensor:
    r"""Compute :math:`\sum_i p_i w^{(i)}` with :math:`w^{(i)} = \arg\min_{v \ge e_i} v^\top G v`.

    Args:
        gramian: ``[K, K]``.
        preference: p, ``[K]``, not negative.

    Returns:
        ``[K]``, float64, on the CPU, none below p.

    Example:
        >>> upgrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([0.5, 0.5]))
        tensor([1.1111, 0.7895], dtype=torch.float64)
    """
    return torch.from_numpy(
        project_rows_on_dual_cone(gramian.detach().cpu().double().numpy(), preference.double().numpy())
    )


class UPGrad(Preferring):
    r"""Project each gradient on the cone of directions that conflict with no task, then take the mean.

    .. math:: d = \sum_i p_i \, \pi(g_i), \qquad \pi(x) = \arg\min_{y : J y \ge 0} \lVert y - x \rVert

    No task is in conflict with d, which is linear in the length of each gradient. The projections are exact, by
    non-negative least squares on the K x K Gramian. Heads follow their own, unweighted losses.

    When: no step may go against any task, and all tasks count the same.

    Args:
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the sum 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``preference`` is not positive, or at setup if it names an unknown task.

    Source: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232, section 3.

    Deviations: the authors' library adds a multiple of the identity to the Gramian; here it is as it is.

    Example:
        >>> UPGrad(preference={"depth": 2.0}).preference
        {'depth': 2.0}
    """

    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def weigh(self, signals: Signals) -> Tensor:
        """Project this step's gradients."""
        return upgrad_weights(self.needed(signals, "gramian"), self.on_the_simplex(signals))
