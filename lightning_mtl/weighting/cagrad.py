"""CAGrad helps the worst task most, near the mean gradient."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import NEGLIGIBLE, Measure, Weighting
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import project_on_dual_cone
from lightning_mtl.solvers.gramian import EPS, THRESHOLD, Array, SolverError, factor, min_norm_of_factor, normalize

Rescale = Literal["c", "c2"]
# Of the squared multiplier, relative.
TOLERANCE = 1e-11
# 3 or 4 are the rule.
MAX_ITERATIONS = 100


def cagrad_weights(gramian: Tensor, c: float, rescale: Rescale | None = None) -> Tensor:
    r"""Compute the weights of :math:`d = g_0 + c \lVert g_0 \rVert g_w / \lVert g_w \rVert`.

    Args:
        gramian: ``[K, K]``.
        c: The ball's radius, relative to the mean gradient's norm.
        rescale: Divide by ``"c"`` 1 + c or ``"c2"`` 1 + c².

    Returns:
        ``[K]``, float64, on the CPU.

    Example:
        >>> cagrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), c=0.5)
        tensor([0.7041, 0.5000], dtype=torch.float64)
    """
    weights = torch.from_numpy(solve_cagrad(gramian.detach().cpu().double().numpy(), c))
    return weights / {None: 1.0, "c": 1 + c, "c2": 1 + c**2}[rescale]


class CAGrad(Weighting):
    r"""Find, near the mean gradient, the direction that improves the worst task most: conflict-averse descent.

    .. math:: \max_d \min_k g_k \cdot d \quad \text{s.t.} \quad \lVert d - g_0 \rVert \le c \lVert g_0 \rVert,
        \qquad g_0 = \tfrac{1}{K} \sum_k g_k

    solved exactly by its dual over the simplex, :math:`d = g_0 + c \lVert g_0 \rVert g_w / \lVert g_w \rVert`. With
    c = 0 it is the mean gradient; with c of 1 or more no task is in conflict with d. Heads follow their own, unweighted
    losses.

    When: gradients conflict, and the mean loss has to fall, too; ``c`` trades it for the worst task.

    Args:
        c: c; the paper uses 0.2 to 0.5.
        rescale: None as in the paper; the official code divides d by 1 + c² (``"c2"``) or 1 + c (``"c"``).
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, 2021, arXiv:2110.14048, algorithm 1.

    Deviations: the official code multiplies d by K, to match a sum of losses, and leaves the heads at 1: beside the
    paper's mean gradient, followed here, its heads learn K times slower than its trunk. Where the dual's optimum is a
    combination of zero length, a Pareto-stationary point, d is the mean gradient's projection on the dual cone, the
    limit that the paper leaves open.

    Example:
        >>> CAGrad(c=0.4).c
        0.4
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    negligible = NEGLIGIBLE
    search_space: ClassVar[SearchSpace] = {"c": Range(0.1, 0.9), "at": Choice(("trunk", "features"))}

    def __init__(self, c: float = 0.5, *, rescale: Rescale | None = None, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        if not 0 <= c < math.inf:
            raise ValueError(f"CAGrad(c={c}) must be at least 0 and finite.")
        if rescale not in (None, "c", "c2"):
            raise ValueError(f"CAGrad(rescale={rescale!r}) must be None, 'c' or 'c2'.")
        self.c, self.rescale = c, rescale

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        return cagrad_weights(self.needed(signals, "gramian"), self.c, self.rescale)


# The solver, on NumPy arrays.


def solve_cagrad(gramian: ArrayLike, c: float) -> Array:
    r"""Weights of the direction that improves the worst task most, near the mean gradient.

    With the mean gradient :math:`g_0` the direction solves

    .. math:: \max_d \min_k \; g_k^\top d \quad \text{s.t.} \quad \|d - g_0\| \le c \|g_0\| ,

    by way of its dual over the simplex, :math:`g_w = \sum_k w_k g_k`:

    .. math:: \min_w \; g_w^\top g_0 + c \|g_0\| \|g_w\| , \qquad d = g_0 + c \|g_0\| \, g_w / \|g_w\| .

    What is returned are the weights of d itself, :math:`1 / K + c \|g_0\| w / \|g_w\|`. Liu et al. 2021,
    arXiv:2110.14048, algorithm 1; nothing is divided by 1 + c, as the paper's code does.

    Where :math:`g_w = 0` is optimal the primal problem has many solutions: the one nearest the mean gradient is taken,
    its projection on the dual cone.

    Args:
        gramian: ``[K, K]``, inner products of the gradients.
        c: Radius of the ball relative to the norm of the mean gradient, not negative. With 1 or more no task is in
            conflict with the direction.

    Returns:
        Weights, ``[K]``, none below ``1 / K``.

    Raises:
        ValueError: If ``gramian`` is not a square, finite matrix with a non-negative diagonal.
        SolverError: If the search does not converge.

    Example:
        >>> solve_cagrad([[18.0, -22.0], [-22.0, 38.0]], c=0.5).round(6)
        array([0.704124, 0.5     ])
    """
    cosines, norms = normalize(gramian)
    num_tasks = len(norms)
    mean = np.full(num_tasks, 1 / num_tasks)
    directions = factor(cosines)
    norms = norms / (norms.max() or 1.0)
    rows = directions * norms  # The gradients as columns, in K dimensions.
    center = rows @ mean
    squared_norm = float(center @ center)
    if c == 0 or squared_norm <= THRESHOLD * norms.mean() ** 2:  # Where the mean gradient vanishes, so does the ball.
        return mean
    radius = c * math.sqrt(squared_norm)
    w = _search(rows, norms, center, radius)
    if w is None:
        return project_on_dual_cone(gramian, mean)
    combined = rows @ w
    return mean + radius / math.sqrt(combined @ combined) * w


def _search(rows: Array, norms: Array, center: Array, radius: float) -> Array | None:
    r"""The dual's optimum over the simplex; None if the combined gradient vanishes there.

    For a given multiplier :math:`\tau` of the ball, the optimum is the minimum-norm point of the shifted gradients
    :math:`g_k + g_0 / \tau`, and the multiplier is the right one when :math:`\tau \|g_w\|` is the radius. The square of
    that product grows with :math:`\tau^2`, from zero and piecewise linearly, one piece for each set of tasks with
    weight: so the secant method ends at the solution as soon as it meets the right piece twice.
    """
    target = radius**2
    sizes = np.where(norms == 0, 1.0, norms)  # Weight on a zero row is all lost, as if to an opposite one.
    # The piece of a single task, the one that would be best alone, is exact for the first guess.
    alone = int((center @ rows + radius * norms).argmin())
    point = target / norms[alone] ** 2 if norms[alone] > 0 else target
    low, high, last_point, last_value = 0.0, math.inf, 0.0, 0.0
    for _ in range(MAX_ITERATIONS):
        shifted = rows + (center / math.sqrt(point))[:, None]
        lengths = np.sqrt(np.einsum("ij,ij->j", shifted, shifted))
        w = min_norm_of_factor(shifted / np.where(lengths == 0, 1.0, lengths), lengths)
        combined = rows @ w
        square = float(combined @ combined)
        value = point * square
        vanishes = square <= THRESHOLD * float(sizes @ w) ** 2
        if value < target:
            if vanishes:  # The solution is at a larger multiplier, where the combined gradient is shorter still.
                return None
            low = point
        else:
            high = point
        slope = (value - last_value) / (point - last_point)
        last_point, last_value = point, value
        point = point + (target - value) / slope if slope > 0 else math.inf
        if abs(value - target) <= 64 * EPS * target or abs(point - last_point) <= TOLERANCE * last_point:
            return None if vanishes else w
        if not low < point < high:
            point = math.sqrt(low * high) if low > 0 and high < math.inf else (low * 16 if low > 0 else high / 16)
    residual = abs(last_value / target - 1)
    raise SolverError("solve_cagrad", num_tasks=len(norms), iterations=MAX_ITERATIONS, residual=residual)
