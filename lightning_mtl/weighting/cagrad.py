"""Weights that help the worst task most, near the mean gradient."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import cagrad_weights as solve

Rescale = Literal["c", "c2"]


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
    weights = torch.from_numpy(solve(gramian.detach().cpu().double().numpy(), c))
    return weights / {None: 1.0, "c": 1 + c, "c2": 1 + c**2}[rescale]


class CAGrad(Weighting):
    r"""Find, near the mean gradient, the direction that improves the worst task most: conflict-averse descent.

    .. math:: \max_d \min_k g_k \cdot d \quad \text{s.t.} \quad \lVert d - g_0 \rVert \le c \lVert g_0 \rVert,
        \qquad g_0 = \tfrac{1}{K} \sum_k g_k

    solved exactly by its dual over the simplex, :math:`d = g_0 + c \lVert g_0 \rVert g_w / \lVert g_w \rVert`. With
    c = 0 it is the mean gradient; with c of 1 or more no task is in conflict with d. Heads follow their own, unweighted
    losses.

    Args:
        c: c; the paper uses 0.2 to 0.5.
        rescale: None as in the paper; the official code divides d by 1 + c² (``"c2"``) or 1 + c (``"c"``).
        **common: ``importance``, ``start_step``, ``total``, ``at`` and ``every_n_steps``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, 2021, arXiv:2110.14048, algorithm 1.

    Deviations: where the dual's optimum is a combination of zero length, a Pareto-stationary point, d is the mean
    gradient's projection on the dual cone, the limit that the paper leaves open.

    Example:
        >>> CAGrad(c=0.4).c
        0.4
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
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
        assert signals.gramian is not None  # noqa: S101 - for mypy: what the class measures
        return cagrad_weights(signals.gramian, self.c, self.rescale)
