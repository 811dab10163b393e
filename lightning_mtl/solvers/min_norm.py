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
    MGDA (Désidéri 2012; Sener & Koltun 2018, arXiv 1810.04650), where the paper's own Frank-Wolfe is approximate.

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
    smallest = norms.min()
    if smallest == 0:
        zero = norms == 0
        return zero / zero.sum()
    if len(norms) == 1:
        return np.ones(1)
    return min_norm_of_normalised(cosines, smallest / norms)


def min_norm_of_normalised(cosines: Array, steepness: Array) -> Array:
    r"""Minimum-norm weights from cosines and from the smallest norm divided by each norm.

    With :math:`v_k = w_k \|g_k\|` and :math:`a_k \propto 1 / \|g_k\|` the problem is to minimise :math:`v^\top C v`
    over :math:`v \ge 0, a^\top v = 1`. The constraint goes into the objective, exactly: along a ray
    :math:`v = t u, a^\top u = 1`, the minimum of :math:`t^2 q + (t - 1)^2`, with :math:`q = u^\top C u`, is
    :math:`q / (1 + q)`, which grows with :math:`q`. So the non-negative least squares problem

    .. math:: \min_{v \ge 0} \; \|R v\|^2 + (a^\top v - 1)^2, \qquad C = R^\top R

    has its solution on the same ray as the constrained one; no penalty has to be large.

    Args:
        cosines: ``[K, K]``, normalised Gramian.
        steepness: ``[K]``, the vector a above; positive, its largest entry 1, so that q is at most 1.

    Returns:
        Weights, ``[K]``, of the gradients as they are, not of the unit ones.
    """
    root = factor(cosines)
    num_tasks = len(cosines)
    target = np.zeros(num_tasks + 1)
    target[-1] = 1.0
    max_iterations = 10 * num_tasks + 100
    try:
        v, _ = nnls(np.concatenate((root, steepness[None])), target, maxiter=max_iterations)
    except RuntimeError as error:
        raise SolverError(
            "min_norm_weights", num_tasks=num_tasks, iterations=max_iterations, residual=float("nan")
        ) from error
    weights: Array = v * steepness
    weights /= weights.sum()
    return weights
