"""The minimum-norm point of the convex hull of the gradients, which vanishes at Pareto-stationary points."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from lightning_mtl.solvers.gramian import Array, Normalized, SolverError, factor, normalize

# Of the squared length of a convex combination of unit gradients, relative: below it the combination vanishes.
THRESHOLD = 1e-12


class Solution(NamedTuple):
    """Weights, and whether they are a stand-in because the problem has no solution.

    Attributes:
        weights: ``[K]``.
        stationary: True if the point is Pareto-stationary: then ``weights`` are those of the minimum-norm point.

    Example:
        >>> from lightning_mtl.solvers import alpha_fair_weights
        >>> alpha_fair_weights([[1.0, -3.0], [-3.0, 9.0]]).stationary
        True
    """

    weights: Array
    stationary: bool


def min_norm_weights(gramian: ArrayLike) -> Array:
    r"""Weights of the shortest convex combination of the gradients.

    .. math:: \arg\min_w \; w^\top G w \quad \text{s.t.} \quad w \ge 0, \; \sum_k w_k = 1

    The optimum satisfies :math:`G w \ge w^\top G w`, with equality where :math:`w_k > 0`. It is the exact solution of
    MGDA (Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650), where the paper's own Frank-Wolfe is approximate.

    The weights are unique if the gradients are affinely independent; otherwise (duplicated rows) one optimum is
    returned, and it is the combined gradient that is unique. With zero rows the minimum is 0, and they share the
    weight equally.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.

    Returns:
        Weights, ``[K]``, non-negative, summing to one.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal.
        SolverError: If the active-set iteration does not end.

    Example:
        >>> min_norm_weights([[18.0, -22.0], [-22.0, 38.0]]).round(6)
        array([0.6, 0.4])
    """
    cosines, norms = normalize(gramian)
    return min_norm_of_factor(factor(cosines), norms)


def min_norm_of_factor(directions: Array, norms: Array) -> Array:
    r"""Minimum-norm weights of vectors given as unit directions and norms.

    With :math:`v_k = w_k \|g_k\|` and :math:`a_k \propto 1 / \|g_k\|` the problem is to minimize :math:`\|R v\|^2`
    over :math:`v \ge 0, a^\top v = 1`. The constraint goes into the objective, exactly: along a ray
    :math:`v = t u, a^\top u = 1`, the minimum of :math:`t^2 q + (t - 1)^2`, with :math:`q = \|R u\|^2`, is
    :math:`q / (1 + q)`, which grows with :math:`q`. So the non-negative least squares problem

    .. math:: \min_{v \ge 0} \; \|R v\|^2 + (a^\top v - 1)^2

    has its solution on the same ray as the constrained one; no penalty has to be large.

    Args:
        directions: ``[m, K]``, the vectors divided by their norms as columns, in any coordinates: R above.
        norms: ``[K]``, non-negative.

    Returns:
        Weights, ``[K]``, of the vectors as they are, not of their directions.
    """
    shortest = norms.min()
    if shortest == 0:
        zero = norms == 0
        share: Array = zero / zero.sum()
        return share
    steepness = shortest / norms  # At most 1, so that q is, too.
    target = np.zeros(len(directions) + 1)
    target[-1] = 1.0
    max_iterations = 10 * len(norms) + 100
    try:
        v, _ = nnls(np.concatenate((directions, steepness[None])), target, maxiter=max_iterations)
    except RuntimeError as error:
        raise SolverError(
            "min_norm_weights", num_tasks=len(norms), iterations=max_iterations, residual=float("nan")
        ) from error
    weights: Array = v * steepness
    weights /= weights.sum()
    return weights


def is_stationary(gramian: ArrayLike) -> bool:
    r"""Whether some convex combination of the gradients vanishes, up to rounding.

    The criterion is :math:`\min_v v^\top C v \le 10^{-12} \operatorname{tr} C` over the simplex, C being the Gramian
    with its diagonal normalized, so that a task with a short gradient is not taken for a stationary point. A zero row
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
    return is_stationary_normalized(normalize(gramian))


def is_stationary_normalized(normalized: Normalized) -> bool:
    """The same, of a Gramian that is normalized already."""
    cosines, norms = normalized
    if norms.min() == 0:
        return True
    unit = min_norm_of_factor(factor(cosines), np.ones_like(norms))
    return bool(unit @ cosines @ unit <= THRESHOLD * len(norms))


def min_norm_solution(gramian: ArrayLike) -> Solution:
    """The minimum-norm weights, marked as a stand-in."""
    return Solution(min_norm_weights(gramian), stationary=True)
