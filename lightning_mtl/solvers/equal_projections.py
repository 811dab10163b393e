"""One direction has the same projection on every unit gradient, and its weights are found here."""

import numpy as np
from numpy.typing import ArrayLike

from lightning_mtl.solvers.gramian import THRESHOLD, Array, SolverError, normalize

# Eigenvalues of the cosines below this, relative to the largest, are the rounding of rows in float32: directions along
# them would be all noise, and as long as the eigenvalue is small.
CUTOFF = 1e-7


def equal_projection_weights(gramian: ArrayLike) -> Array:
    r"""Weights of the combination whose projection on every unit gradient is 1.

    With the cosines :math:`C = N^{-1} G N^{-1}`, N the norms on a diagonal,

    .. math:: w = N^{-1} C^{+} \mathbf{1}, \qquad \hat g_k^\top J^\top w = 1 .

    It is the direction of IMTL-G and of ConFIG, which differ in its length. Where the gradients are dependent, the
    projections are 1 in the sense of least squares: for parallel gradients each has its share, for opposite ones all
    weights are 0. A zero row has weight 0.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.

    Returns:
        Weights, ``[K]``, of either sign.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal.
        SolverError: If the eigenvalue decomposition fails.

    Example:
        >>> equal_projection_weights([[4.0, 0.0], [0.0, 1.0]])
        array([0.5, 1. ])
    """
    cosines, norms = normalize(gramian)
    try:
        eigenvalues, eigenvectors = np.linalg.eigh(cosines)
    except np.linalg.LinAlgError as error:
        raise SolverError(
            "equal_projection_weights", num_tasks=len(norms), iterations=0, residual=float("nan")
        ) from error
    kept = eigenvalues > max(CUTOFF * eigenvalues[-1], 0.0)
    basis = eigenvectors[:, kept]
    shares = basis.sum(axis=0)
    if shares @ shares <= THRESHOLD * len(norms):  # No direction has a projection on all of them that is not rounding.
        return np.zeros_like(norms)
    unit_weights = basis @ (shares / eigenvalues[kept])
    weights: Array = np.divide(unit_weights, norms, out=np.zeros_like(norms), where=norms > 0)
    return weights
