"""The minimum-norm point of the convex hull of the gradients."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from lightning_mtl.solvers.errors import SolverError
from lightning_mtl.solvers.gramian import Array, factor, normalise


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
    cosines, norms = normalise(gramian)
    return min_norm_of_factor(factor(cosines), norms)


def min_norm_of_factor(directions: Array, norms: Array) -> Array:
    r"""Minimum-norm weights of vectors given as unit directions and norms.

    With :math:`v_k = w_k \|g_k\|` and :math:`a_k \propto 1 / \|g_k\|` the problem is to minimise :math:`\|R v\|^2`
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
