"""A projection on the gradients' dual cone finds the nearest direction that conflicts with none of them."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from lightning_mtl.solvers.gramian import Array, Normalized, SolverError, check_vector, factor, normalize


def project_on_dual_cone(gramian: ArrayLike, preference: ArrayLike) -> Array:
    r"""Weights of the projection of one combined gradient on the dual cone of the gradients.

    The vector :math:`u = J^\top p` is projected on :math:`\{d : J d \ge 0\}`. By duality the projection is
    :math:`J^\top w`, with

    .. math:: w = \arg\min_{v \ge p} \; v^\top G v ,

    elementwise. It is the direction of DualProj, the quadratic program of GEM (Lopez-Paz & Ranzato 2017,
    arXiv:1706.08840).

    Where the gradients are linearly dependent w need not be unique; the projection is.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.
        preference: ``[K]``, the weights p of the vector to project; ``1 / K`` each for the mean gradient.

    Returns:
        Weights, ``[K]``, none below ``preference``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal, or ``preference`` is
            not a finite vector of its size.
        SolverError: If the active-set iteration does not end.

    Example:
        >>> project_on_dual_cone([[18.0, -22.0], [-22.0, 38.0]], [0.5, 0.5]).round(6)
        array([0.611111, 0.5     ])
    """
    normalized = normalize(gramian)
    preference = check_vector("preference", preference, len(normalized.norms))
    weights: Array = preference + _additions(normalized, preference[None])[0]
    return weights


def project_rows_on_dual_cone(gramian: ArrayLike, preference: ArrayLike) -> Array:
    r"""Weights of the combination of the gradients' own projections on their dual cone.

    Every gradient :math:`g_i` is projected on :math:`\{d : J d \ge 0\}` by itself, and the projections are combined:

    .. math:: w = \sum_i p_i \, w^{(i)}, \qquad w^{(i)} = \arg\min_{v \ge e_i} \; v^\top G v .

    It is the direction of UPGrad (Quinton & Rey 2024, arXiv:2406.16232), which is linear under scaling of the rows.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.
        preference: ``[K]``, non-negative factors p of the projections; ``1 / K`` each for their mean.

    Returns:
        Weights, ``[K]``, none below ``preference``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal, or ``preference`` is
            not a finite, non-negative vector of its size.
        SolverError: If the active-set iteration does not end.

    Example:
        >>> project_rows_on_dual_cone([[18.0, -22.0], [-22.0, 38.0]], [0.5, 0.5]).round(6)
        array([1.111111, 0.789474])
    """
    normalized = normalize(gramian)
    preference = check_vector("preference", preference, len(normalized.norms))
    if preference.min() < 0:
        k = int(preference.argmin())
        raise ValueError(f"preference must not be negative, but preference[{k}] is {preference[k]}.")
    weights: Array = preference + _additions(normalized, np.diag(preference)).sum(axis=0)
    return weights


def _additions(normalized: Normalized, combinations: Array) -> Array:
    """What has to be added to each row of ``combinations``, ``[m, K]``, for its gradient to enter the dual cone.

    In units of the normalized rows the least non-negative addition mu solves ``min ||R mu + R (norms * p)||``: a
    non-negative least squares problem. It is solved for a right-hand side of size one, and scaled back.
    """
    cosines, norms = normalized
    vectors = combinations * norms
    conflict = (vectors @ cosines < 0).any(axis=1)
    additions = np.zeros_like(vectors)
    if not conflict.any():
        return additions
    vectors = vectors[conflict]
    sizes = np.abs(vectors).max(axis=1, keepdims=True)
    root = factor(cosines)
    targets = (vectors / -sizes) @ root.T
    max_iterations = 10 * len(norms) + 100
    try:
        solved = np.array([nnls(root, target, maxiter=max_iterations)[0] for target in targets])
    except RuntimeError as error:
        raise SolverError(
            "project_on_dual_cone", num_tasks=len(norms), iterations=max_iterations, residual=float("nan")
        ) from error
    divisors = np.where(norms == 0, 1.0, norms)  # The addition of a zero row is zero, whatever it is divided by.
    additions[conflict] = solved * sizes / divisors
    return additions
