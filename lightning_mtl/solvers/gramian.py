"""Gramians are checked, normalized and factored here, and their minimum-norm point shows which are stationary."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dsyevd
from scipy.optimize import nnls

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
# Of the squared length of a convex combination of unit gradients, relative: below it the combination vanishes.
THRESHOLD = 1e-12


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
