"""ReLoBRaLo weighs by how far each loss has come, since the last step and now and then since the first."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals

# A loss that was next to nothing before has come from there by a factor that no number stands for.
LARGEST = 1e30


def relative_progress(losses: Tensor, earlier: Tensor, tau: float) -> Tensor:
    r"""Compute :math:`K \operatorname{softmax}\big( L(t) / (\tau L(t')) \big)`, ``[K]``.

    Example:
        >>> relative_progress(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 4.0]), tau=1.0)
        tensor([1., 1.])
    """
    tiny = torch.finfo(losses.dtype).tiny
    ratios = (losses / earlier.clamp(min=tiny)).clamp(max=LARGEST) / tau
    return len(losses) * ratios.clamp(max=LARGEST).softmax(0)


class ReLoBRaLo(Weighting):
    r"""Weigh by the relative progress of each loss, with random looks back: the slowest gets the most.

    .. math:: w(t) = \alpha \big( \rho_t \, w(t - 1) + (1 - \rho_t) \, b(t, 0) \big) + (1 - \alpha) \, b(t, t - 1),
        \qquad b(t, t') = K \operatorname{softmax}\!\left( \frac{L(t)}{\tau L(t')} \right)

    where :math:`\rho_t` is 1 with probability ρ and 0 otherwise, and w(0) = 1. Each b sums to K, and so do the weights
    as long as all tasks are there. What counts is each loss beside itself, so that the losses' units do not matter; a
    loss that is too large for the others from the start stays so. Losses must be positive.

    When: some losses of a differential equation fall slower than others, in whatever units; it costs nothing.

    Args:
        alpha: α, at least 0 and below 1: the share of the past.
        tau: τ; a large one makes the weights equal, a small one leaves all weight to the slowest loss.
        rho: ρ, the probability not to look back to the first step.
        seed: Where the random numbers begin.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Bischof and Kraus, Multi-Objective Loss Balancing for Physics-Informed Deep Learning, 2021,
    arXiv:2110.09813, equations 10 and 11.

    Deviations: the official code takes α = 0 in its second step, so that the past begins with that step's b; here it
    begins with ones. The code adds 1e-12 to each denominator.

    Example:
        >>> ReLoBRaLo(tau=0.1).rho
        0.99
    """

    search_space: ClassVar[SearchSpace] = {
        "alpha": Range(0.9, 0.9999),
        "tau": Range(1e-2, 10.0, log=True),
        "rho": Range(0.9, 1.0),
    }

    def __init__(
        self,
        alpha: float = 0.999,
        tau: float = 1.0,
        rho: float = 0.99,
        *,
        seed: int = 0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(**common)
        if not 0 <= alpha < 1:
            raise ValueError(f"ReLoBRaLo(alpha={alpha}) must be at least 0 and below 1.")
        if not 0 < tau < torch.inf:
            raise ValueError(f"ReLoBRaLo(tau={tau}) must be above 0 and finite.")
        if not 0 <= rho <= 1:
            raise ValueError(f"ReLoBRaLo(rho={rho}) must be between 0 and 1.")
        self.alpha, self.tau, self.rho = alpha, tau, rho
        self.add_state("weights", torch.tensor(1.0))
        self.add_state("last", torch.tensor(torch.nan))
        self.add_state("first", torch.tensor(torch.nan))
        self.add_generator("random", seed)
        self.weights: Tensor
        self.last: Tensor
        self.first: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by this step's losses beside earlier ones; a task in its first step keeps its weight."""
        losses, weights = signals.losses, self.weights.to(signals.losses)
        known = ~self.last.isnan()
        last, first = (torch.where(known, one.to(losses), losses) for one in (self.last, self.first))
        looks_back = float(torch.rand((), generator=self.random_numbers("random"))) >= self.rho
        past = relative_progress(losses, first, self.tau) if looks_back else weights
        newest = self.alpha * past + (1 - self.alpha) * relative_progress(losses, last, self.tau)
        return torch.where(known, newest, weights)

    def update(self, signals: Signals) -> None:
        """Keep losses and weights, and go on to the next random number."""
        self.weights = self.weigh(signals)
        self.first = torch.where(self.first.isnan(), signals.losses.to(self.first), self.first)
        self.last = signals.losses.to(self.first)
        self.advance("random")
