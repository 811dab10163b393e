"""SoftOptimalUncertainty weighs by a softmax of the inverse losses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, Outgrown, check_loss_floor


def soft_optimal_weights(losses: Tensor, temperature: float, loss_floor: float = LOSS_FLOOR) -> Tensor:
    r"""Compute :math:`\operatorname{softmax}_k\big(1 / (T L_k)\big)`, ``[K]``; losses of 0 are left out.

    Example:
        >>> soft_optimal_weights(torch.tensor([0.5, 2.0, 1.0]), temperature=1.0)
        tensor([0.6285, 0.1402, 0.2312])
    """
    inverse = 1 / (temperature * losses.clamp(min=loss_floor))
    weights = inverse.masked_fill(losses <= 0, -torch.inf).softmax(0)
    return weights.nan_to_num(1 / len(losses))  # all losses are 0


class SoftOptimalUncertainty(Weighting):
    r"""Weigh tasks by a softmax of the inverse losses: uncertainty weighting solved in closed form, made soft.

    .. math:: w_k = \operatorname{softmax}_k\!\left( \frac{1}{T L_k} \right)

    1 / L_k is the weight that uncertainty weighting would end at if each loss stayed as it is; the softmax keeps a
    small loss from taking all. Σ w = 1. Losses must not be negative. A warning says, once, which task's weight is more
    than 1e4 times the median of the others'.

    When: losses of unlike scale, without learned numbers; there is a temperature to tune.

    Args:
        temperature: T, above 0. It has to be tuned for each set of losses, whose units it divides: small values leave
            the smallest loss alone, large ones weigh all tasks alike.
        loss_floor: A loss below this counts as this large; it changes nothing above.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Kirchdorfer et al., Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning, 2024,
    arXiv:2408.07985, as UW-SO.

    Deviations: a loss of 0 is left out, and the floor is not the paper's. With gradient accumulation the first
    micro-batch gives the weights.

    Example:
        >>> SoftOptimalUncertainty(temperature=10.0).temperature
        10.0
    """

    takes_logarithms = True
    search_space: ClassVar[SearchSpace] = {"temperature": Range(0.1, 100.0, log=True)}

    def __init__(
        self, temperature: float = 1.0, *, loss_floor: float = LOSS_FLOOR, **common: Unpack[CommonArguments]
    ) -> None:
        super().__init__(**common)
        if not 0 < temperature < torch.inf:
            raise ValueError(f"SoftOptimalUncertainty(temperature={temperature}) must be above 0 and finite.")
        self.temperature = temperature
        self.loss_floor = check_loss_floor("SoftOptimalUncertainty", loss_floor)
        self.outgrown = Outgrown("SoftOptimalUncertainty", "Raise temperature")

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by this step's losses."""
        weights = soft_optimal_weights(signals.losses, self.temperature, self.loss_floor)
        self.outgrown.look(weights, signals)
        return weights
