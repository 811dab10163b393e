"""GradDrop lets every element of the direction follow the tasks of one sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.arguments import AggregatorArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals


def graddrop(rows: Tensor, leak: Tensor, uniform: Tensor) -> Tensor:
    r"""Keep the gradients of one sign in each element, the positive ones with the probability of their share.

    Args:
        rows: ``[K, n]``.
        leak: ``[K]``, the share of each row that passes whatever its sign.
        uniform: ``[n]``, drawn evenly from [0, 1).

    Returns:
        ``[n]``.

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [-3.0, 2.0]])
        >>> graddrop(rows, torch.zeros(2), torch.tensor([0.5, 0.5]))
        tensor([-3.,  3.])
    """
    positive = rows.clamp(min=0)
    above = positive.sum(dim=0)
    purity = above / (2 * above - rows.sum(dim=0))  # The denominator is the sum of the absolute values.
    kept = 1 - leak
    chosen = torch.where(purity > uniform, kept @ positive, kept @ (rows - positive))
    return chosen + leak @ rows


class GradDrop(Aggregator):
    r"""Let one sign win in each element of the gradient, at random by its share: gradient sign dropout.

    .. math:: P = \frac{1}{2} \left( 1 + \frac{\sum_i g_i}{\sum_i |g_i|} \right), \qquad
        d = \sum_i \big( l_i + (1 - l_i) M_i \big) \circ g_i, \qquad
        M_i = [P > U] \circ [g_i > 0] + [P < U] \circ [g_i < 0]

    element by element, U drawn evenly from [0, 1]. Where all tasks agree on the sign nothing is dropped, and where one
    is alone, however short its gradient is, its sign is all there is. Heads follow
    their own, unweighted losses.

    When: conflict that differs from number to number of the gradients, and noise does no harm.

    Args:
        leak: l, the share of a task's gradient that is never dropped, between 0 and 1: a number, or ``{task: l}``
            where tasks not named have 0.
        seed: Where the random numbers begin.
        **common: ``importance``, ``start_step`` and ``at``, as in :class:`~lightning_mtl.Aggregator`. ``at="trunk"``
            drops the shared parameters' gradients, ``at="features"`` those of the trunk's output.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``leak`` names an unknown task, or
            ``"features"`` meets several processes.

    Source: Chen et al., Just Pick a Sign, 2020, arXiv:2010.06808, algorithm 1.

    Deviations: the paper drops at the trunk's output, and finds the signs of a whole batch there from its gradients
    times the signs of the activations, summed over the samples. Here ``"trunk"`` drops the parameters' gradients, which
    belong to the whole batch as they are, and ``"features"`` each sample's by its own signs. The paper's
    code (lingvo) rescales what is left to the length of the undropped sum by default; this class does not. On each kind
    of device the
    random numbers are the same on all ranks and after resuming, but a GPU's are others than a CPU's.

    Example:
        >>> GradDrop(leak={"depth": 0.2}).leak
        {'depth': 0.2}
    """

    takes_any_rows: ClassVar[bool] = True
    search_space: ClassVar[SearchSpace] = {
        "leak": Range(0.0, 0.9),
        "at": Choice(("trunk", "features")),
    }
    by_task: ClassVar[tuple[str, ...]] = ("leak",)

    def __init__(
        self, leak: float | Mapping[str, float] = 0.0, *, seed: int = 0, **common: Unpack[AggregatorArguments]
    ) -> None:
        super().__init__(**common)
        for share in leak.values() if isinstance(leak, Mapping) else [leak]:
            if not 0 <= share <= 1:
                raise ValueError(f"GradDrop(leak={leak}) must be at least 0 and at most 1.")
        self.leak = dict(leak) if isinstance(leak, Mapping) else leak
        self.add_generator("random", seed)

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse random numbers for samples of which each process has others."""
        if self.at == "features" and pl_module.trainer.world_size > 1:
            raise ValueError(
                "GradDrop(at='features') draws numbers for the samples of one process, and every other one would draw "
                "the same for its own; use at='trunk' on several processes."
            )

    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        """Drop the losing sign of each element."""
        given, otherwise = (self.leak, 0.0) if isinstance(self.leak, dict) else ({}, self.leak)
        leak = self.of_tasks(given, otherwise, signals, rows)
        # Millions of numbers: drawn where they are needed.
        generator = self.random_numbers("random", rows.device)
        uniform = torch.rand(rows.shape[1], generator=generator, device=rows.device)
        return graddrop(rows, leak, uniform)

    def update(self, signals: Signals) -> None:
        """Go on to the next step's random numbers."""
        self.advance("random")
