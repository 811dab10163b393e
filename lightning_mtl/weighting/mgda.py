"""MGDA takes the common descent direction of least norm."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.solvers import min_norm_weights

Normalize = Literal["l2", "loss", "loss+"]


def mgda_weights(gramian: Tensor, losses: Tensor, normalize: Normalize | None = None) -> Tensor:
    r"""Compute :math:`\arg\min_{w \ge 0, \sum w = 1} w^\top G w` for gradients divided by a scale each.

    Args:
        gramian: ``[K, K]``, G of the gradients as they are.
        losses: ``[K]``, for the scales that need them.
        normalize: The scale of g_k: ``"l2"`` ‖g_k‖, ``"loss"`` L_k, ``"loss+"`` L_k ‖g_k‖, None 1. A scale that is not
            positive counts as 1.

    Returns:
        ``[K]``, float64, on the CPU, to be applied to the gradients as they are.

    Example:
        >>> mgda_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.ones(2))
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    products = gramian.detach().cpu().double()
    scales = torch.ones(len(products), dtype=torch.float64)
    if normalize in ("l2", "loss+"):
        scales = scales * products.diagonal().sqrt()
    if normalize in ("loss", "loss+"):
        scales = scales * losses.detach().cpu().double()
    if normalize is not None:
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        products = products / torch.outer(scales, scales)
    return torch.from_numpy(min_norm_weights(products.numpy()))


class MGDA(Weighting):
    r"""Weigh tasks so that the shared step is the shortest convex combination of their gradients.

    .. math:: \min_{w} \Big\lVert \sum_k w_k g_k \Big\rVert^2 \quad \text{s.t.} \quad w \ge 0,\; \sum_k w_k = 1

    Either the combination is zero, and the parameters are Pareto stationary, or it is a direction along which no task's
    loss rises, to first order. The problem is solved exactly, as non-negative least squares on the K x K Gramian. Heads
    follow their own, unweighted losses.

    The combination is never longer than the shortest gradient: where a task has almost none, because it is learned or
    its loss is small, it has almost all of the weight and the shared parameters almost stand still. A gradient of
    exactly zero takes no part, so that the limit is another than the value: what has the least norm cannot ignore a
    short gradient.

    When: gradients that conflict and are of similar length. ``at="features"`` costs little more than a plain step.

    Args:
        normalize: Solve for gradients divided by ``"l2"`` ‖g_k‖, ``"loss"`` L_k or ``"loss+"`` L_k ‖g_k‖, and apply the
            weights to the gradients as they are. None follows the paper; without normalizing, tasks with small
            gradients take most of the weight.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`. ``at="features"`` is MGDA-UB, the paper's upper bound at one backward
            pass.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Désidéri, Multiple-Gradient Descent Algorithm, 2012; Sener and Koltun, Multi-Task Learning as
    Multi-Objective Optimization, 2018, arXiv:1810.04650.

    Deviations: the official code runs a few Frank-Wolfe steps, which end short of the optimum for many tasks, and
    scales the heads by the weights, too. At the features its inner products run over the whole batch, as here; LibMTL
    sums the samples' gradients first, which is not the paper's bound.

    Example:
        >>> MGDA(at="features").at
        'features'
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        "normalize": Choice((None, "l2", "loss", "loss+")),
        "at": Choice(("trunk", "features")),
    }

    def __init__(self, normalize: Normalize | None = None, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        if normalize not in (None, "l2", "loss", "loss+"):
            raise ValueError(f"MGDA(normalize={normalize!r}) must be None, 'l2', 'loss' or 'loss+'.")
        self.normalize = normalize

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian."""
        return mgda_weights(self.needed(signals, "gramian"), signals.losses, self.normalize)
