"""FAMO makes all losses fall at the same rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.learned import AdamState, Learned, adam_step
from lightning_mtl.weighting.loss_floor import LOSS_FLOOR, Outgrown, check_loss_floor

EPS = 1e-8


def famo_weights(logits: Tensor, gaps: Tensor) -> Tensor:
    r"""Compute :math:`w_k \propto \operatorname{softmax}_k(\xi) / D_k` with Σ w = 1; all ``[K]``.

    Example:
        >>> famo_weights(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.5455, 0.2727, 0.1818])
    """
    ratios = torch.softmax(logits, dim=0) / gaps
    return ratios / ratios.sum()


def famo_gradient(logits: Tensor, gaps: Tensor, gaps_after: Tensor) -> Tensor:
    r"""Compute the derivative by ξ of :math:`\sum_k z_k \log (D_k / D'_k)` with z = softmax(ξ); all ``[K]``.

    Example:
        >>> famo_gradient(torch.zeros(2), torch.ones(2), torch.exp(torch.tensor([-1.0, 0.0])))
        tensor([ 0.2500, -0.2500])
    """
    z = torch.softmax(logits, dim=0)
    fall = torch.log(gaps) - torch.log(gaps_after)
    return z * (fall - (z * fall).sum())


class FAMO(Learned):
    r"""Weigh tasks so that the logarithms of all losses fall alike: fast adaptive multitask optimization.

    .. math:: w_k = c \frac{z_k}{D_k}, \quad z = \operatorname{softmax}(\xi), \quad D_k = L_k - b_k + \epsilon,
        \quad \sum_k w_k = 1

    After each step the logits ξ take one Adam step down :math:`\sum_k z_k (\log D_k - \log D'_k) + \gamma \lVert \xi
    \rVert^2 / 2`, D' being the same batch's under the new parameters: what fell fastest loses weight.

    When: many tasks whose losses should fall at the same relative rate, without the cost of gradients.

    Args:
        lr: Step size of the logits' Adam.
        gamma: γ, how strongly the logits are drawn to 0; the official code's default. Its scripts use 0.001 to 0.01 on
            data, and 0 where the same objective is descended to its end: without noise, a γ above 0 can stall there.
        losses_after: Where D' comes from. ``"forward"`` passes each batch a second time, without gradients, after the
            step, as the official code does. It costs a forward pass. Buffers, plain attributes of modules, metrics and
            random numbers do not notice; what lies inside other objects does, and what an overridden ``task_losses``
            logs is logged twice. ``"next_batch"`` is free: the next batch's losses serve, the same but for the
            difference between batches.
        min_losses: ``{task: b}``, the lowest loss a task can have; tasks not named have 0. Losses must not be lower.
        loss_floor: A loss that is nearer than this to its lowest counts as this far away, so that a learned task does
            not take all of the weight; it changes nothing above. A warning says, once, which task's weight is more than
            1e4 times the median of the others'.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``min_losses`` names an unknown task, or
            ``"forward"`` meets automatic optimization.

    Source: Liu et al., FAMO: Fast Adaptive Multitask Optimization, 2023, arXiv:2306.03792, algorithm 1.

    Deviations: the paper moves ξ by plain descent, the official code, followed here, by Adam with weight decay γ. The
    code also clips the shared gradients, and no heads', to norm 1; ``gradient_clip_val`` clips both. It has no floor
    but ε. With gradient accumulation the first micro-batch gives D, and the change is that of the window's means.

    Example:
        >>> FAMO(losses_after="next_batch").gamma
        0.01
    """

    search_space: ClassVar[SearchSpace] = {
        "lr": Range(1e-3, 1e-1, log=True),
        "gamma": Range(1e-4, 1e-1, log=True),
    }
    by_task: ClassVar[tuple[str, ...]] = ("min_losses",)

    def __init__(
        self,
        *,
        lr: float = 0.025,
        gamma: float = 0.01,
        losses_after: Literal["forward", "next_batch"] = "forward",
        min_losses: Mapping[str, float] | None = None,
        loss_floor: float = LOSS_FLOOR,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__("logits", lr=lr, **common)
        if gamma < 0:
            raise ValueError(f"FAMO(gamma={gamma}) must be at least 0.")
        if losses_after not in ("forward", "next_batch"):
            raise ValueError(f"FAMO(losses_after={losses_after!r}) must be 'forward' or 'next_batch'.")
        self.gamma, self.min_losses = gamma, dict(min_losses or {})
        self.loss_floor = check_loss_floor("FAMO", loss_floor)
        self.outgrown = Outgrown("FAMO", "Raise loss_floor to bound the weight")
        self.wants_losses_after = losses_after == "forward"
        self.takes_logarithms = not self.min_losses
        self.add_state("last", torch.tensor(torch.nan))
        self.logits: Tensor
        self.last: Tensor

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse a second forward pass where the step is out of sight."""
        if self.wants_losses_after and pl_module.automatic_optimization:
            raise ValueError(
                "FAMO(losses_after='forward') has to follow the optimizer's step, which automatic optimization takes "
                "out of its sight; use losses_after='next_batch', or leave automatic_optimization False."
            )

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the logits, moved by what the last step did to the losses."""
        logits = self.logits if self.wants_losses_after else self._moved(signals)[0]
        weights = famo_weights(logits, self._gaps(signals, signals.losses))
        self.outgrown.look(weights, signals)
        return weights

    def update(self, signals: Signals) -> None:
        """Keep the moved logits."""
        self.logits, self.adam = self._moved(signals)
        self.last = self._gaps(signals, signals.losses)

    def _moved(self, signals: Signals) -> tuple[Tensor, AdamState]:
        """One Adam step, for the tasks whose change is known by now."""
        before, after = self.last, self._gaps(signals, signals.losses)
        if self.wants_losses_after:
            if signals.losses_after is None:
                return self.logits, self.adam
            before, after = after, self._gaps(signals, signals.losses_after)
        known = ~before.isnan()
        gradient = famo_gradient(self.logits, torch.where(known, before, after), after) + self.gamma * self.logits
        moved, adam = adam_step(self.logits, gradient, self.adam, lr=self.lr)
        chosen = [torch.where(known, new, old) for new, old in zip(adam, self.adam, strict=True)]
        return torch.where(known, moved, self.logits), AdamState(*chosen)

    def _gaps(self, signals: Signals, losses: Tensor) -> Tensor:
        losses = losses.to(self.logits)
        if self.min_losses:
            losses = losses - self.of_tasks(self.min_losses, 0.0, signals, losses)
        return losses.clamp(min=self.loss_floor) + EPS
