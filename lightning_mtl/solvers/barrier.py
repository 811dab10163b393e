"""Nash-MTL and FairGrad solve one convex problem: the quadratic of the Gramian plus a barrier at zero."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg.lapack import dposv

from lightning_mtl.solvers.gramian import (
    EPS,
    THRESHOLD,
    Array,
    Solution,
    SolverError,
    check_vector,
    is_stationary_normalized,
    min_norm_solution,
    normalize,
)

# Of the weights, relative. Newton's method squares it in the step that is still taken.
TOLERANCE = 1e-6
# 5 or so are the rule. Norms 1e16 apart together with an exponent far from 1 take some hundred.
MAX_ITERATIONS = 1000
# The change, times p + 1, from which on Newton's step is taken whole.
FULL_STEP = 0.25


def alpha_fair_weights(gramian: ArrayLike, alpha: float = 1.0, preference: ArrayLike | None = None) -> Solution:
    r"""Weights of the alpha-fair combination of the gradients.

    They satisfy :math:`G w = (p / w)^{1/\alpha}`, elementwise, and are the only optimum of the convex problem

    .. math:: \min_{w > 0} \; \tfrac12 w^\top G w - \sum_k p_k^{1/\alpha} \frac{w_k^{1 - 1/\alpha}}{1 - 1/\alpha} ,

    which has none at a Pareto-stationary point. With :math:`\alpha = 1`, a logarithm in place of the power, this is the
    Nash bargaining solution (Navon et al. 2022, arXiv:2202.01017, equation 2), whose combined gradient has norm
    :math:`\sqrt K`; a larger one cares more for the task that improves least (Ban & Ji 2024, arXiv:2402.15638). Both
    papers approximate; here the weights are exact.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.
        alpha: Fairness, positive. Between 0.1 and 10 is tested.
        preference: ``[K]``, p, the positive factors of the tasks' utilities; None for ones.

    Returns:
        The weights, ``[K]``, positive. At a Pareto-stationary point, where there are none, the minimum-norm weights
        with ``stationary=True``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal, or ``alpha`` or
            ``preference`` is not positive and finite.
        SolverError: If Newton's method does not converge.

    Example:
        >>> alpha_fair_weights([[18.0, -22.0], [-22.0, 38.0]]).weights.round(6)
        array([0.591461, 0.407071])
        >>> alpha_fair_weights([[18.0, -22.0], [-22.0, 38.0]], alpha=2.0).weights.round(6)
        array([0.471363, 0.319454])
    """
    if not (0 < alpha < math.inf):
        raise ValueError(f"alpha must be positive and finite, but is {alpha}.")
    exponent = 1 / alpha
    normalized = normalize(gramian)
    cosines, norms = normalized
    shortest = float(norms.min())
    if shortest == 0:
        return min_norm_solution(gramian)
    # With v = norms * w the equation is C v = c v^-p. Norms are in units of about their geometric mean, so that powers
    # of them stay in range.
    unit = math.sqrt(shortest) * math.sqrt(norms.max())
    norms = norms / unit
    factors = norms ** (exponent - 1)
    if preference is not None:
        given = check_vector("preference", preference, len(norms))
        if given.min() <= 0:
            raise ValueError(f"preference must be positive, but preference[{given.argmin()}] is {given.min()}.")
        factors = factors * given**exponent
    v, iterations, residual = _newton(cosines, factors, exponent)
    if residual == math.inf or (_may_be_stationary(cosines, v) and is_stationary_normalized(normalized)):
        return min_norm_solution(gramian)
    if math.isnan(residual) and np.linalg.eigvalsh(cosines)[0] < -4 * len(norms) * EPS:
        # Newton's method broke down on an indefinite Gramian, one of rows multiplied in float32 perhaps, at weights
        # that leave no more of the gradients than its error: they cancel as far as it can tell.
        return min_norm_solution(gramian)
    if not residual <= TOLERANCE:
        raise SolverError("alpha_fair_weights", num_tasks=len(norms), iterations=iterations, residual=residual)
    return Solution(v / norms * unit ** (-2 / (exponent + 1)), stationary=False)


def _may_be_stationary(cosines: Array, v: Array) -> bool:
    """A bound on the shortest convex combination u of the unit gradients, to spare most points its computation.

    With d the combination of weights v: ``|u| |d| >= u · d >= min(C v)``.
    """
    products = cosines @ v
    return not products.min() > np.sqrt(THRESHOLD * len(v) * max(float(v @ products), 0.0))


def _newton(cosines: Array, factors: Array, exponent: float) -> tuple[Array, int, float]:
    """Damped Newton's method for ``C v = c v^-p``, in relative steps: ``v (1 + t d)``.

    Each iterate is first checked: if its convex combination of the unit gradients vanishes, the point is stationary.
    It is then put at the optimum of its ray.

    Returns:
        v, the iterations spent, and the largest relative residual, which is 0 if only rounding is left, infinite if
        there is no solution, and nan if the Hessian was not positive definite.
    """
    num_tasks = len(factors)
    ones = np.ones(num_tasks)
    v = factors ** (1 / (exponent + 1))
    change = math.inf
    for iteration in range(1, MAX_ITERATIONS + 1):
        products = cosines @ v
        force = factors * v**-exponent
        energy = float(products @ v)
        if energy <= THRESHOLD * num_tasks * float(ones @ v) ** 2:
            return v, iteration, math.inf
        if change > 0.1:  # Nearer to the solution, rounding in the energy would throw the iterate back.
            ray = (float(force @ v) / energy) ** (1 / (exponent + 1))
            v *= ray
            products *= ray
            force *= ray**-exponent
        gradient = force - products
        stiffness = exponent * force / v
        hessian = cosines.copy()
        hessian.ravel()[:: num_tasks + 1] += stiffness  # The diagonal.
        _, step, info = dposv(hessian.T, gradient, overwrite_a=1)
        if info != 0:
            return v, iteration, math.nan
        relative = step / v
        previous, change = change, math.sqrt(relative @ relative)
        if (exponent + 1) * change > FULL_STEP:
            step *= _length(step, relative, products, force, stiffness, exponent)
        v += step
        if change <= TOLERANCE:
            return v, iteration, change
        if 0.1 > change > previous / 4 and _is_rounding(gradient, v):
            return v, iteration, 0.0
    return v, MAX_ITERATIONS, float(np.abs(gradient / force).max())


def _length(step: Array, relative: Array, products: Array, force: Array, stiffness: Array, exponent: float) -> float:
    """How far to go along a Newton step.

    With m the largest relative decrease, a length of t = 1 / (1 + (p + 1) m) lowers the objective by at least half of
    t times the squared Newton decrement, because the barrier's curvature grows by no more than (1 - t m)^-(p + 1) on
    the way: so the method converges from anywhere. A step of small m is taken whole, for the quadratic convergence;
    for a large one, nine tenths of the way to the boundary are tried first.
    """
    shrinkage = max(-float(relative.min()), 0.0)
    damping = (exponent + 1) * shrinkage
    if damping <= FULL_STEP:
        return 1.0
    length = 1 / (1 + damping)
    if damping > 1:
        bold = min(0.9 / shrinkage, 1.0)
        curvature = (force - products) @ step - stiffness @ step**2  # Of the quadratic alone, by Newton's equation.
        slope = (products - force * (1 + bold * relative) ** -exponent) @ step + bold * curvature
        if slope <= 0:  # The objective is convex and still falls there.
            return max(length, bold)
    return length


def _is_rounding(gradient: Array, v: Array) -> bool:
    """Whether the gradient is no more than the rounding error of ``C v``."""
    return bool(np.abs(gradient).max() <= 4 * len(v) * EPS * v.sum())
