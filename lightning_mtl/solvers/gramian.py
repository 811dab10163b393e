"""Gramians are checked, normalized and factored here before they are solved for; the error of all solvers."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dsyevd

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


class SolverError(RuntimeError):
    """A solver over the Gramian did not converge.

    Args:
        solver: Name of the function that failed.
        num_tasks: Number of rows K of the Gramian.
        iterations: Iterations spent.
        residual: What was left of the optimality condition, relative; ``nan`` where the solver could not tell.

    Example:
        >>> print(SolverError("min_norm_weights", num_tasks=3, iterations=130, residual=0.5))
        min_norm_weights did not converge on a Gramian of K=3 tasks: residual 0.5 after 130 iterations.
    """

    def __init__(self, solver: str, *, num_tasks: int, iterations: int, residual: float) -> None:
        super().__init__(
            f"{solver} did not converge on a Gramian of K={num_tasks} tasks: "
            f"residual {residual:.3g} after {iterations} iterations."
        )
        self.solver = solver
        self.num_tasks = num_tasks
        self.iterations = iterations
        self.residual = residual


class Normalized(NamedTuple):
    """A Gramian as cosines and norms: ``gramian[i, j] = norms[i] * cosines[i, j] * norms[j]``.

    Attributes:
        cosines: ``[K, K]``, unit diagonal, except that a zero row stays zero.
        norms: ``[K]``, Euclidean norms of the rows of the Jacobian.
    """

    cosines: Array
    norms: Array


def normalize(gramian: ArrayLike) -> Normalized:
    """Check a Gramian and scale its diagonal to one.

    Solvers that work on the cosines do not see how far apart the norms of the gradients are: 1e-8 beside 1e8 is
    ordinary when one task's loss is a sum over pixels and another's a mean.

    Args:
        gramian: ``[K, K]``, symmetric and positive semi-definite up to rounding.

    Returns:
        The cosines and the norms.

    Raises:
        ValueError: If ``gramian`` is not square, is empty, has an entry that is not finite, or a negative diagonal.

    Example:
        >>> normalize([[4.0, 0.0], [0.0, 9.0]]).norms
        array([2., 3.])
    """
    matrix = np.asarray(gramian, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"gramian must be a square matrix with at least one row, but has shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"gramian must be finite, but gramian[{i}, {j}] is {matrix[i, j]}.")
    diagonal = matrix.diagonal()
    smallest = diagonal.min()
    if smallest < 0:
        k = int(diagonal.argmin())
        raise ValueError(f"gramian must have squared norms on its diagonal, but gramian[{k}, {k}] is {smallest}.")
    norms = np.sqrt(diagonal)
    divisors = norms
    if smallest == 0:
        zero = norms == 0
        divisors = np.where(zero, 1.0, norms)
        matrix = np.where(zero | zero[:, None], 0.0, matrix)
    # Two divisions, since the product of two norms can leave the range of float64 where each quotient does not.
    return Normalized(matrix / divisors / divisors[:, None], norms)


def check_vector(name: str, vector: ArrayLike, num_tasks: int) -> Array:
    """Check one number per task, given by the user under this name."""
    result = np.asarray(vector, dtype=np.float64)
    if result.shape != (num_tasks,):
        raise ValueError(f"{name} must have one entry per task, shape {(num_tasks,)}, but has shape {result.shape}.")
    if not np.isfinite(result).all():
        k = int(np.argmin(np.isfinite(result)))
        raise ValueError(f"{name} must be finite, but {name}[{k}] is {result[k]}.")
    return result


def factor(cosines: Array) -> Array:
    """Factor a normalized Gramian into ``R.T @ R`` with a square R of full rank.

    Eigenvalues below the precision of the Gramian are raised to it, which moves no entry by more than its own error
    and keeps an active-set method from walking 1e13 far along a null direction of dependent gradients. The precision
    is that of float64, unless a negative eigenvalue shows that the rows were multiplied in float32. (Multiply them in
    float64: a wrong eigenvalue that happens to be positive shows nothing, and at weakly stationary points it moves
    the dual cone visibly.)

    Args:
        cosines: ``[K, K]``.

    Returns:
        ``R``, ``[K, K]``, its rows orthogonal.

    Raises:
        SolverError: If the eigenvalue decomposition fails.

    Example:
        >>> root = factor(np.ones((2, 2)))
        >>> (root.T @ root).round(6)
        array([[1., 1.],
               [1., 1.]])
    """
    eigenvalues, eigenvectors, info = dsyevd(cosines)
    if info != 0:
        raise SolverError("factor", num_tasks=len(cosines), iterations=int(info), residual=float("nan"))
    floor = max(4 * len(cosines) * EPS, -2 * eigenvalues[0])
    result: Array = np.sqrt(np.maximum(eigenvalues, floor))[:, None] * eigenvectors.T
    return result
