"""PCGrad projects conflicting gradients off each other."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals


def random_orders(num_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw for each task the order in which it meets the others, ``[K, K - 1]``.

    Example:
        >>> random_orders(2, torch.Generator()).tolist()
        [[1], [0]]
    """
    keys = torch.rand(num_tasks, num_tasks, generator=generator).fill_diagonal_(2.0)
    return keys.argsort(dim=1)[:, :-1]


def pcgrad_weights(gramian: Tensor, orders: Tensor) -> Tensor:
    r"""Compute the weights of :math:`\sum_i g'_i`, each :math:`g'_i` being :math:`g_i` projected off the others.

    The projections are linear combinations of the gradients, so that the Gramian is all they need.

    Args:
        gramian: ``[K, K]``.
        orders: ``[K, K - 1]``, the tasks that each task meets, in order.

    Returns:
        ``[K]``, float64, on the CPU, none below 1.

    Example:
        >>> pcgrad_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([[1], [0]]))
        tensor([2.2222, 1.5789], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double().numpy()
    rows = np.arange(len(G))
    norms = G.diagonal()
    C = np.eye(len(G))  # g'_i = sum_j C_ij g_j
    products = G.copy()  # g'_i . g_j
    for others in orders.numpy().T:
        conflict = np.minimum(products[rows, others], 0.0)
        removed = np.divide(conflict, norms[others], out=np.zeros_like(norms), where=conflict < 0)
        C[rows, others] -= removed
        products -= removed[:, None] * G[others]
    return torch.from_numpy(C.sum(axis=0))


class PCGrad(Weighting):
    r"""Project each task's gradient off those it conflicts with, then add them up: projecting conflicting gradients.

    .. math:: g'_i \leftarrow g'_i - \frac{\min(g'_i \cdot g_j, 0)}{\lVert g_j \rVert^2} g_j
        \quad \text{for all } j \ne i \text{ in random order}, \qquad d = \sum_i g'_i

    starting from :math:`g'_i = g_i`. Without a conflict d is the plain sum. Heads follow their own, unweighted losses.

    When: mild conflict; nothing to tune.

    Args:
        seed: Where the random orders begin.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, 2020, arXiv:2001.06782, algorithm 1.

    Deviations: none from the paper. Its official code, in TensorFlow, draws an order and discards it: tasks keep
    theirs. The others are projected off a gradient however short it is; one of exactly zero takes no part, so that the
    limit is another than the value.

    Example:
        >>> PCGrad(seed=1).weighs_heads
        False
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {"at": Choice(("trunk", "features"))}

    def __init__(self, *, seed: int = 0, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        self.add_generator("random", seed)

    def weigh(self, signals: Signals) -> Tensor:
        """Project in this step's orders."""
        return pcgrad_weights(
            self.needed(signals, "gramian"), random_orders(signals.num_tasks, self.random_numbers("random"))
        )

    def update(self, signals: Signals) -> None:
        """Go on to the next step's orders."""
        self.advance("random")
