"""The Nash bargaining solution among the gradients."""

from numpy.typing import ArrayLike

from lightning_mtl.solvers.barrier import barrier_weights
from lightning_mtl.solvers.stationary import Solution


def nash_weights(gramian: ArrayLike) -> Solution:
    r"""Weights of the Nash bargaining solution among the gradients.

    They satisfy :math:`G \alpha = 1 / \alpha`, elementwise, and are the optimum of the convex problem

    .. math:: \min_{\alpha > 0} \; \tfrac12 \alpha^\top G \alpha - \sum_k \log \alpha_k ,

    so the combined gradient always has norm :math:`\sqrt K`. Navon et al. 2022, arXiv:2202.01017, equation 2; there
    it is approximated by a sequence of convex programmes, here it is exact.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.

    Returns:
        The weights, ``[K]``, positive. At a Pareto-stationary point, where there are none, the minimum-norm weights
        with ``stationary=True``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal.
        SolverError: If Newton's method does not converge.

    Example:
        >>> nash_weights([[18.0, -22.0], [-22.0, 38.0]]).weights.round(6)
        array([0.591461, 0.407071])
    """
    return barrier_weights(gramian, 1.0, solver="nash_weights")
