"""STCH descends a smooth maximum of the losses, each relative to where it started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.preference import check_preference
from lightning_mtl.weighting.scale_invariant import scale_invariant_weights


def stch_weights(values: Tensor, preference: Tensor, mu: float) -> Tensor:
    r"""Compute the derivative of :math:`\mu \log \sum_k \exp(\lambda_k v_k / \mu)` by each value.

    Args:
        values: v, ``[K]``.
        preference: λ, ``[K]``.
        mu: How smooth; toward 0 it is the maximum.

    Example:
        >>> stch_weights(torch.tensor([0.5, 2.0, 1.0]), torch.full((3,), 1 / 3), mu=0.1)
        tensor([0.0022, 0.3198, 0.0114])
    """
    return preference * torch.softmax(preference * values / mu, dim=0)


class STCH(Weighting):
    r"""Descend a smooth maximum of the tasks' losses: smooth Tchebycheff scalarization.

    .. math:: \min_\theta K \mu \log \sum_k \exp\!\left( \frac{\lambda_k}{\mu} \log \frac{L_k}{\nu_k} \right), \qquad
        w_k = \frac{K \lambda_k}{L_k} \operatorname{softmax}_k\!\left( \frac{\lambda}{\mu} \log \frac{L}{\nu} \right)

    with ν the nadir: the mean losses over the last epoch of the warmup, which itself descends
    :math:`\sum_k \log L_k`. The task that has improved least since then gets most of the weight. Losses must not be
    negative.

    When: no task may fall behind, or one point of the Pareto front is wanted.

    Args:
        mu: μ; toward 0 only the worst task counts, large values count all alike.
        warmup_epochs: Epochs of the warmup; with 0 the nadir is the loss of a task's first step.
        preference: ``{task: λ}``; tasks not named keep 1.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``preference`` names an unknown task.

    Source: Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, 2024, arXiv:2402.19078,
    equation 9.

    Deviations: the paper's scalarization is :math:`\mu \log \sum_k \exp(\lambda_k (f_k - z^*_k) / \mu)` with λ on the
    simplex and z* the ideal point. The released code for multi-task learning, followed here, puts :math:`\log (L_k /
    \nu_k)` for :math:`f_k - z^*_k`, warms up, drops λ (1 for every task) and multiplies by K, which keeps the steps as
    long as the warmup's. Its ``STCH_warmup_epoch=4`` is 5 here: it counts from 0. A loss of 0 has weight 0, and 1 / L_k
    is that of 1e-6 for a smaller one. With gradient accumulation the first micro-batch gives the weights.

    Example:
        >>> STCH(mu=0.5, warmup_epochs=2).mu
        0.5
    """

    takes_logarithms = True
    search_space: ClassVar[SearchSpace] = {"mu": Range(0.1, 10.0, log=True)}
    by_task: ClassVar[tuple[str, ...]] = ("preference",)

    def __init__(
        self,
        mu: float = 1.0,
        warmup_epochs: int = 5,
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(**common)
        if not mu > 0:
            raise ValueError(f"STCH(mu={mu}) must be above 0.")
        if warmup_epochs < 0:
            raise ValueError(f"STCH(warmup_epochs={warmup_epochs}) must be at least 0.")
        self.mu, self.warmup_epochs = mu, warmup_epochs
        self.preference = check_preference("STCH", preference)
        self.add_state("nadir", torch.tensor(0.0))
        self.add_state("count", torch.tensor(0.0))
        self.nadir: Tensor
        self.count: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Differentiate the smooth maximum at this step's losses."""
        losses = signals.losses
        inverse = scale_invariant_weights(losses)
        if signals.epoch < self.warmup_epochs:
            return inverse
        nadir = torch.where((self.count > 0) & (self.nadir > 0), self.nadir.to(losses), losses)
        tiny = torch.finfo(losses.dtype).tiny
        logarithms = losses.clamp(min=tiny).log() - nadir.clamp(min=tiny).log()
        preference = self.of_tasks(self.preference, 1.0, signals, losses)
        return signals.num_tasks * stch_weights(logarithms, preference, self.mu) * inverse

    def update(self, signals: Signals) -> None:
        """Take the losses of the warmup's last epoch into the nadir."""
        late = signals.epoch >= self.warmup_epochs
        if signals.epoch < self.warmup_epochs - 1:
            return
        # After the warmup: only of a task that was absent from its last epoch.
        taken = (self.count == 0) | (not late)
        self.count = self.count + taken
        mean = self.nadir + (signals.losses.to(self.nadir) - self.nadir) / self.count
        self.nadir = torch.where(taken, mean, self.nadir)
