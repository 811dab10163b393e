"""What solvers do at Pareto-stationary points, where a convex combination of the gradients vanishes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lightning_mtl.solvers.gramian import Array, Normalised, factor, normalise
from lightning_mtl.solvers.min_norm import min_norm_of_factor, min_norm_weights

THRESHOLD = 1e-12


class Solution(NamedTuple):
    """Weights, and whether they are a stand-in because the problem has no solution.

    Attributes:
        weights: ``[K]``.
        stationary: True if the point is Pareto-stationary: then ``weights`` are those of the minimum-norm point.

    Example:
        >>> from lightning_mtl.solvers import nash_weights
        >>> nash_weights([[1.0, -3.0], [-3.0, 9.0]]).stationary
        True
    """

    weights: Array
    stationary: bool


def is_stationary(gramian: ArrayLike) -> bool:
    r"""Whether some convex combination of the gradients vanishes, up to rounding.

    The criterion is :math:`\min_v v^\top C v \le 10^{-12} \operatorname{tr} C` over the simplex, C being the Gramian
    with its diagonal normalised, so that a task with a short gradient is not taken for a stationary point. A zero row
    is one.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.

    Returns:
        True at a Pareto-stationary point.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal.
        SolverError: If the minimum-norm point is not found.

    Example:
        >>> is_stationary([[1.0, -3.0], [-3.0, 9.0]]), is_stationary([[1.0, -2.9], [-2.9, 9.0]])
        (True, False)
    """
    return is_stationary_normalised(normalise(gramian))


def is_stationary_normalised(normalised: Normalised) -> bool:
    """The same, of a Gramian that is normalised already."""
    cosines, norms = normalised
    if norms.min() == 0:
        return True
    unit = min_norm_of_factor(factor(cosines), np.ones_like(norms))
    return bool(unit @ cosines @ unit <= THRESHOLD * len(norms))


def min_norm_solution(gramian: ArrayLike) -> Solution:
    """The minimum-norm weights, marked as a stand-in."""
    return Solution(min_norm_weights(gramian), stationary=True)
