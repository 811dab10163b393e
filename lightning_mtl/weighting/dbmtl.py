"""DBMTL balances losses by their logarithms, and their gradients by the longest one's length."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import send
from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, check_loss_floor
from lightning_mtl.weighting.row_memory import RowMemory
from lightning_mtl.weighting.scale_invariant import scale_invariant_weights


def to_the_longest(lengths: Tensor) -> Tensor:
    """Compute what makes all gradients as long as the longest, ``[K]``; 0 for a length of 0.

    Example:
        >>> to_the_longest(torch.tensor([1.0, 4.0, 0.0]))
        tensor([4., 1., 0.])
    """
    return torch.where(lengths > 0, lengths.max() / lengths, torch.zeros_like(lengths))


class DBMTL(RowMemory):
    r"""Descend the losses' logarithms, each with a gradient as long as the longest: dual-balancing.

    .. math:: w_k = \frac{1}{L_k} \, \frac{\max_j n_j}{n_k}, \qquad n_k = \frac{\lVert g_k \rVert}{L_k}

    Heads follow the logarithms alone, with 1 / L_k. Losses must not be negative. However short a gradient is, it is
    made as long as the others'; one of exactly zero takes no part.

    With β > 0 running means of the logarithms' gradients take the place of :math:`g_k / L_k`. They are a direction that
    no weights describe, so that none are logged, and need K P numbers of memory for P shared parameters beside the
    gradients, in checkpoints, too; and gradients of all shared parameters: neither ``at="features"`` nor
    a sharded trunk (FSDP2) has these.

    When: losses and gradients of unlike scale; noisy gradients with ``beta``, which keeps K P numbers more.

    Args:
        beta: β, at least 0 and below 1: the share of the old mean.
        decay: σ in :math:`\beta_t = \beta / t^\sigma`, t a task's steps.
        loss_floor: A loss below this counts as this large; it changes nothing above.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or β > 0 meets another place than the trunk,
            ``every_n_steps`` or ``total``.

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, 2023, arXiv:2308.12029, algorithm 1.

    Deviations: the authors' code (LibMTL) adds 1e-8 to losses and norms. A loss of 0 has weight 0. With
    ``every_n_steps`` the heads' 1 / L_k is held, too. The running means begin at 0, as in the code.

    Example:
        >>> DBMTL(at="features").measures, DBMTL(beta=0.9).measures
        ('norms', 'rows')
    """

    measures: ClassVar[Measure] = "norms"
    weighs_heads: ClassVar[bool] = False
    takes_logarithms = True
    search_space: ClassVar[SearchSpace] = {
        "beta": Choice((0.0, 0.5, 0.9)),
        "decay": Range(0.0, 1.0),
    }

    def __init__(
        self,
        beta: float = 0.0,
        *,
        decay: float = 0.0,
        loss_floor: float = LOSS_FLOOR,
        **common: Unpack[GradientArguments],
    ) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"DBMTL(beta={beta}) must be at least 0 and below 1.")
        if decay < 0:
            raise ValueError(f"DBMTL(decay={decay}) must be at least 0.")
        if beta > 0:
            self.measures = "rows"  # type: ignore[misc]
        super().__init__(**common)
        if beta > 0 and self.total is not None:
            raise ValueError(f"DBMTL(beta={beta}, total={self.total}) has no weights to rescale; leave total out.")
        self.beta, self.decay, self.loss_floor = beta, decay, check_loss_floor("DBMTL", loss_floor)
        self.add_state("inverse", torch.tensor(torch.nan))
        self.add_state("steps", torch.tensor(0))
        self.inverse: Tensor
        self.steps: Tensor
        self._coming: tuple[int, Tensor] | None = None  # the step, and what is kept if it is taken

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by this step's losses and norms."""
        self.inverse = scale_invariant_weights(signals.losses, self.loss_floor)
        norms = send(self.needed(signals, "norms"), self.inverse.device, self.inverse.dtype)
        return self.inverse * to_the_longest(norms * self.inverse)

    def head_weights(self) -> Tensor:
        """Weigh the heads by 1 / L_k."""
        return torch.where(self.inverse.isnan(), torch.ones_like(self.inverse), self.inverse)

    def decide_by(self, signals: Signals, rows: Tensor) -> Decision:
        """Combine the running means of the logarithms' gradients."""
        self.inverse = scale_invariant_weights(signals.losses, self.loss_floor)
        share = (self.beta / (self.steps + 1) ** self.decay).to(rows)
        means = torch.lerp(rows * self.inverse.to(rows)[:, None], self.memory.to(rows), share[:, None])
        self._coming = signals.step, means
        factors = self.with_importance(to_the_longest(torch.linalg.vector_norm(means, dim=1)), signals)
        ones = torch.ones_like(signals.losses)
        return Decision(ones, self.head_weights().to(ones), [factors @ means])

    def update(self, signals: Signals) -> None:
        """Keep the running means."""
        if self._coming is not None and self._coming[0] == signals.step:  # not one that was skipped
            self.memory = self._coming[1]
            self.steps = self.steps + 1
        self._coming = None
