"""The alpha-fair combination of the gradients."""

import math

from numpy.typing import ArrayLike

from lightning_mtl.solvers.barrier import barrier_weights
from lightning_mtl.solvers.stationary import Solution


def fairgrad_weights(gramian: ArrayLike, alpha: float = 1.0) -> Solution:
    r"""Weights of the alpha-fair combination of the gradients.

    They satisfy :math:`G w = w^{-1/\alpha}`, elementwise, and are the optimum of the convex problem

    .. math:: \min_{w > 0} \; \tfrac12 w^\top G w - \sum_k \frac{w_k^{1 - 1/\alpha}}{1 - 1/\alpha} .

    With :math:`\alpha = 1` (a logarithm in place of the power) it is the Nash bargaining solution; a larger one cares
    more for the task that improves least. Ban & Ji 2024, arXiv:2402.15638; there it is approximated by least squares,
    here it is exact.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.
        alpha: Fairness, positive. Between 0.1 and 10 is tested.

    Returns:
        The weights, ``[K]``, positive. At a Pareto-stationary point, where there are none, the minimum-norm weights
        with ``stationary=True``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal, or ``alpha`` is not
            positive and finite.
        SolverError: If Newton's method does not converge.

    Example:
        >>> fairgrad_weights([[18.0, -22.0], [-22.0, 38.0]], alpha=2.0).weights.round(6)
        array([0.471363, 0.319454])
    """
    if not (0 < alpha < math.inf):
        raise ValueError(f"alpha must be positive and finite, but is {alpha}.")
    return barrier_weights(gramian, 1 / alpha, solver="fairgrad_weights")
