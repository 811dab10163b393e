"""MetaBalance brings the auxiliary gradients near the main one's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import send
from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.auxiliary import Auxiliary

# A mean length may be next to nothing beside the main one; no weight of use is larger.
LARGEST = 1e30


def metabalance_weights(magnitudes: Tensor, main_magnitude: Tensor, main: Tensor, relax: float) -> Tensor:
    """Compute ``r m_main / m_k + 1 - r`` for auxiliary tasks, 1 for main ones, ``[K]``; main ones are 1 beside 0.

    Example:
        >>> metabalance_weights(torch.tensor([1.0, 4.0]), torch.tensor(1.0), torch.tensor([1.0, 0.0]), relax=0.5)
        tensor([1.0000, 0.6250])
    """
    tiny = torch.finfo(magnitudes.dtype).tiny
    relaxed = relax * (main_magnitude / magnitudes.clamp(min=tiny)).clamp(max=LARGEST) + (1 - relax)
    return torch.where((main > 0) | main_magnitude.isnan(), torch.ones_like(relaxed), relaxed)


class MetaBalance(Auxiliary):
    r"""Scale each auxiliary gradient toward the main one's length, by running means of the lengths.

    .. math:: w_k = r \frac{m_{main}}{m_k} + 1 - r, \qquad m_k \leftarrow \beta m_k + (1 - \beta) \lVert g_k \rVert

    for auxiliary tasks, 1 for main ones; with several of them :math:`m_{main}` is the mean of theirs. The means include
    the step's own norms; where the main task is absent its last mean serves. Heads follow their own, unweighted losses.

    When: one task counts, and the gradients of those that help it are far longer or shorter than its own.

    Args:
        main: The main task or tasks; None where ``Task(role="auxiliary")`` tells them from the others.
        relax: r, between 0 (equal weights) and 1 (equal lengths); the paper tunes it, 0.7 is the code's default.
        beta: β, at least 0 and below 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range; at setup, if there is no main or no auxiliary task, or ``main``
            names an unknown task or contradicts the roles.

    Source: He et al., MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary
    Tasks, 2022, arXiv:2203.06801, algorithm 1.

    Deviations: the paper and its code compare the norms of each parameter tensor by itself; here one norm is that of
    all that is measured. The means are divided by :math:`1 - \beta^t`, which changes nothing but for a task that comes
    later than the main one. Norms are those of losses as they are: the code has no other scale either.

    Example:
        >>> MetaBalance("purchase", relax=0.5).relax
        0.5
    """

    measures: ClassVar[Measure] = "norms"
    search_space: ClassVar[SearchSpace] = {
        "relax": Range(0.1, 1.0),
        "beta": Range(0.5, 0.99),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self,
        main: str | Sequence[str] | None = None,
        *,
        relax: float = 0.7,
        beta: float = 0.9,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(main, **common)
        if not 0 <= relax <= 1:
            raise ValueError(f"MetaBalance(relax={relax}) must be at least 0 and at most 1.")
        if not 0 <= beta < 1:
            raise ValueError(f"MetaBalance(beta={beta}) must be at least 0 and below 1.")
        self.relax, self.beta = relax, beta
        self.add_state("magnitudes", torch.tensor(0.0))
        self.add_state("count", torch.tensor(0))
        self.add_state("main_magnitude", torch.tensor(torch.nan), per_task=False)
        self.magnitudes: Tensor
        self.count: Tensor
        self.main_magnitude: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Compare the running means, this step's norms included."""
        _, magnitudes, main_magnitude = self._moved(signals)
        return metabalance_weights(magnitudes, main_magnitude, self.main_of(signals, magnitudes), self.relax)

    def update(self, signals: Signals) -> None:
        """Keep the means, where norms were measured."""
        if signals.norms is not None:
            self.magnitudes, _, self.main_magnitude = self._moved(signals)
            self.count = self.count + 1

    def _moved(self, signals: Signals) -> tuple[Tensor, Tensor, Tensor]:
        norms = send(self.needed(signals, "norms"), self.magnitudes.device, self.magnitudes.dtype)
        moved = torch.lerp(norms, self.magnitudes, self.beta)
        means = moved / (1 - self.beta ** (self.count + 1))
        if not self.has_main(signals):
            return moved, means, self.main_magnitude
        main = self.main_of(signals, means)
        return moved, means, (means @ main) / main.sum()
