"""RLW draws the weights at random in every step."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals

Distribution = Literal["normal", "dirichlet"]


def random_weights(num_tasks: int, distribution: Distribution, generator: torch.Generator) -> Tensor:
    """Draw ``[K]`` weights that sum to 1: the softmax of a normal draw, or evenly from the simplex.

    Example:
        >>> weights = random_weights(3, "normal", torch.Generator().manual_seed(0))
        >>> weights.sum()
        tensor(1.)
    """
    if distribution == "normal":
        return torch.randn(num_tasks, generator=generator).softmax(dim=0)
    draws = torch.empty(num_tasks).exponential_(generator=generator)
    return draws / draws.sum()


class RLW(Weighting):
    r"""Weigh tasks at random, anew in every step: random loss weighting, the baseline that methods should beat.

    .. math:: w = \operatorname{softmax}(x), \quad x \sim \mathcal{N}(0, I) \qquad \text{or} \qquad
        w \sim \operatorname{Dirichlet}(1, \dots, 1)

    The weights sum to 1, and are 1 / K on average.

    When: a baseline. Random weights are what every other method should beat.

    Args:
        distribution: ``"normal"`` or ``"dirichlet"``.
        seed: Where the random numbers begin.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Lin et al., Reasonable Effectiveness of Random Weighting, 2022, arXiv:2111.10603, section 3.

    Deviations: none from the paper. The authors' library took, in December 2021 only, the softmax of the Dirichlet
    draw, too, which leaves weights between 1 / (e + K - 1) and e / (e + K - 1).

    Example:
        >>> RLW("dirichlet", seed=1).distribution
        'dirichlet'
    """

    reads_losses: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {"distribution": Choice(("normal", "dirichlet"))}

    def __init__(
        self, distribution: Distribution = "normal", *, seed: int = 0, **common: Unpack[CommonArguments]
    ) -> None:
        super().__init__(**common)
        if distribution not in ("normal", "dirichlet"):
            raise ValueError(f"RLW(distribution={distribution!r}) must be 'normal' or 'dirichlet'.")
        self.distribution = distribution
        self.add_generator("random", seed)

    def weigh(self, signals: Signals) -> Tensor:
        """Draw this step's weights."""
        return random_weights(signals.num_tasks, self.distribution, self.random_numbers("random"))

    def update(self, signals: Signals) -> None:
        """Go on to the next step's."""
        self.advance("random")
