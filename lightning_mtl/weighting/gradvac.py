"""GradVac turns gradients toward each other until they are as alike as they usually are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.pcgrad import random_orders

# A target of 1, once two gradients have been parallel for long, could be reached by an infinite step alone.
LARGEST_TARGET = 1 - 1e-6


def gradvac_weights(gramian: Tensor, targets: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the weights of :math:`\sum_i g'_i`, each turned toward the others until its cosines reach the targets.

    Args:
        gramian: ``[K, K]``.
        targets: ``[K, K]``, the cosine that g'_i should have with g_j at least.
        orders: ``[K, K - 1]``, the tasks that each task meets, in order.

    Returns:
        The weights, ``[K]``, and the cosines as found, ``[K, K]``; float64, on the CPU. A zero gradient has cosines of
        0, and is neither turned nor turned to.

    Example:
        >>> weights, cosines = gradvac_weights(torch.eye(2), 0.6 * torch.ones(2, 2), torch.tensor([[1], [0]]))
        >>> weights
        tensor([1.7500, 1.7500], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double().numpy()
    goal = targets.detach().cpu().double().clamp(-LARGEST_TARGET, LARGEST_TARGET).numpy()
    rows = np.arange(len(G))
    norms = np.sqrt(G.diagonal())
    C = np.eye(len(G))  # g'_i = sum_j C_ij g_j
    products = G.copy()  # g'_i . g_j
    cosines = np.eye(len(G))
    for others in orders.numpy().T:
        own_norms = np.sqrt(np.maximum((C * products).sum(axis=1), 0.0))
        scale = own_norms * norms[others]
        found = np.divide(products[rows, others], scale, out=np.zeros_like(scale), where=scale > 0).clip(-1, 1)
        cosines[rows, others] = found
        goals = goal[rows, others]
        sine, goal_sine = np.sqrt(1 - found**2), np.sqrt(1 - goals**2)
        step = own_norms * (goals * sine - found * goal_sine)
        added = np.divide(step, norms[others] * goal_sine, out=np.zeros_like(step), where=(found < goals) & (scale > 0))
        C[rows, others] += added
        products += added[:, None] * G[others]
    return torch.from_numpy(C.sum(axis=0)), torch.from_numpy(cosines)


class GradVac(Weighting):
    r"""Turn each task's gradient toward the others where it is less like them than usual: gradient vaccine.

    .. math::
        g'_i \leftarrow g'_i + \frac{\lVert g'_i \rVert \big( \hat\phi_{ij} \sqrt{1 - \phi_{ij}^2} - \phi_{ij}
        \sqrt{1 - \hat\phi_{ij}^2} \big)}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j
        \quad \text{if } \phi_{ij} = \cos(g'_i, g_j) < \hat\phi_{ij}

    for all j ≠ i in random order, starting from :math:`g'_i = g_i`; the step's direction is :math:`\sum_i g'_i`. The
    targets start at 0, where this is PCGrad, and follow the cosines:
    :math:`\hat\phi \leftarrow (1 - \beta) \hat\phi + \beta \phi`. Heads follow their own, unweighted losses.

    When: related tasks, whose gradients usually have positive cosines.

    Args:
        beta: β, the weight of the newest cosine; the paper uses 0.01.
        seed: Where the random orders begin.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Wang et al., Gradient Vaccine, 2020, arXiv:2010.05874, algorithm 1.

    Deviations: one cosine for all shared parameters, where the paper tries one a layer as well. A target is kept below
    1 - 1e-6. LibMTL moved a target only where its pair was in conflict until February 2024, and does as here since. The
    others are turned toward a gradient however short it is; one of exactly zero takes no part.

    Example:
        >>> GradVac(beta=0.1).beta
        0.1
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        "beta": Range(1e-3, 1e-1, log=True),
        "at": Choice(("trunk", "features")),
    }

    def __init__(self, beta: float = 0.01, *, seed: int = 0, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        if not 0 <= beta <= 1:
            raise ValueError(f"GradVac(beta={beta}) must be at least 0 and at most 1.")
        self.beta = beta
        self.add_generator("random", seed)
        self.add_state("targets", torch.tensor(0.0), per_pair=True, on_cpu=True)
        self.add_state("cosines", torch.tensor(torch.nan), per_pair=True, on_cpu=True)
        self.targets: Tensor
        self.cosines: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Turn the gradients in this step's orders."""
        orders = random_orders(signals.num_tasks, self.random_numbers("random"))
        weights, cosines = gradvac_weights(self.needed(signals, "gramian"), self.targets, orders)
        self.cosines = cosines.to(self.cosines)
        return weights

    def update(self, signals: Signals) -> None:
        """Move the targets toward the step's cosines, where it measured some, and go on to the next step's orders."""
        moved = torch.lerp(self.targets, self.cosines, self.beta)
        self.targets = torch.where(self.cosines.isnan(), self.targets, moved)
        self.cosines = torch.full_like(self.cosines, torch.nan)
        self.advance("random")
