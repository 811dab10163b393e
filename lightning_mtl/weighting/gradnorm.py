"""GradNorm makes the tasks' gradient norms follow their training rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import send
from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Measure
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.learned import Learned

# Moves of the weights at the lower clamp, from which on the user hears of it.
PATIENCE = 100


def gradnorm_gradient(weights: Tensor, norms: Tensor, loss_ratios: Tensor, alpha: float) -> Tensor:
    r"""Compute :math:`\partial L_{grad} / \partial w_k`, the target norms held constant; all arguments ``[K]``.

    .. math:: \operatorname{sign}(w_k n_k - \bar G r_k^\alpha)\, n_k

    Args:
        weights: w.
        norms: n_k, the norm of task k's unweighted gradient at the last shared layer.
        loss_ratios: L_k(t) / L_k(0); negative ones count as 0.
        alpha: How strongly slow tasks are pulled up.

    Example:
        >>> gradnorm_gradient(torch.ones(2), torch.tensor([1.0, 3.0]), torch.ones(2), alpha=1.5)
        tensor([-1.,  3.])
    """
    scaled = weights * norms
    ratios = loss_ratios.clamp(min=0)
    mean = ratios.mean()
    target = scaled.mean() * torch.where(mean > 0, ratios / mean, torch.ones_like(ratios)) ** alpha
    return torch.sign(scaled - target) * norms


class GradNorm(Learned):
    r"""Learn weights so that each task's gradient norm suits the rate at which the task trains.

    .. math::
        L_{grad} = \sum_k \left| w_k n_k - \bar G r_k^\alpha \right|, \qquad
        n_k = \lVert \nabla_W L_k \rVert, \quad \bar G = \tfrac{1}{K} \sum_k w_k n_k, \quad
        r_k = \frac{L_k(t) / L_k(0)}{\tfrac{1}{K} \sum_j L_j(t) / L_j(0)}

    After each step w takes one Adam step on :math:`L_{grad}`, is clamped from below and rescaled to Σ w = K. Because
    the weights enter linearly, the K norms of the unweighted gradients are all it needs: no second derivative. L_k(0)
    is the loss at the task's first step.

    When: gradients of unlike length, and tasks that train at unlike rates.

    Args:
        alpha: The restoring force; larger for tasks that learn at very different rates. The paper uses 1.5 for NYUv2
            and 0.12 for its toy.
        lr: Step size of the Adam that learns w.
        min_weight: The lower clamp. A warning says, once, which task has been held there for 100 moves in a row.
        at: W; the paper's is the last shared layer. See :class:`~lightning_mtl.Weighting`.
        every_n_steps: Measure, and move the weights, in one step of n.
        gradients: How gradients are measured, as in :class:`~lightning_mtl.Weighting`.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks, 2018,
    arXiv:1711.02257, algorithm 1.

    Deviations: the paper names no optimizer for w nor a lower clamp; Adam and 1e-3 are common in code for it. With
    gradient accumulation the window's first micro-batch gives the norms, the whole window the losses.

    Example:
        >>> GradNorm(alpha=0.12).at
        'last_layer'
    """

    reads_losses: ClassVar[bool] = False
    measures: ClassVar[Measure] = "norms"
    search_space: ClassVar[SearchSpace] = {"alpha": Range(0.1, 3.0), "lr": Range(1e-3, 1e-1, log=True)}

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        lr: float = 0.025,
        min_weight: float = 1e-3,
        at: str | Sequence[str] = "last_layer",
        every_n_steps: int = 1,
        gradients: Literal["automatic", "rows"] = "automatic",
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__("weights", 1.0, lr=lr, at=at, every_n_steps=every_n_steps, gradients=gradients, **common)
        if not min_weight > 0:
            raise ValueError(f"GradNorm(min_weight={min_weight}) must be above 0.")
        if alpha < 0:
            raise ValueError(f"GradNorm(alpha={alpha}) must be at least 0.")
        self.alpha, self.min_weight = alpha, min_weight
        self.add_state("first_losses", torch.tensor(torch.nan))
        self.add_state("steps_at_floor", torch.tensor(0))
        self._said = False
        self.weights: Tensor
        self.first_losses: Tensor
        self.steps_at_floor: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by what has been learned so far."""
        return self.weights

    def update(self, signals: Signals) -> None:
        """Move the weights by one step on the gradient loss, where the norms were measured."""
        losses = signals.losses.to(self.weights)
        self.first_losses = torch.where(self.first_losses.isnan(), losses, self.first_losses)
        if signals.norms is None:
            return
        ratios = torch.where(self.first_losses > 0, losses / self.first_losses, torch.ones_like(losses))
        norms = send(signals.norms, self.weights.device, self.weights.dtype)
        gradient = gradnorm_gradient(self.weights, norms, ratios, self.alpha)
        moved = self.descended(self.weights, gradient)
        clamped = moved.clamp(min=self.min_weight)
        self.weights = clamped * signals.num_tasks / clamped.sum()
        self.steps_at_floor = torch.where(moved <= self.min_weight, self.steps_at_floor + 1, 0)
        # A look at numbers on a device waits for it, so that there is one now and then.
        looks = not self._said and (self.weights.is_cpu or signals.step % PATIENCE == 0)
        if looks and bool((self.steps_at_floor >= PATIENCE).any()):
            self._said = True
            stuck = [task for task, steps in zip(signals.tasks, self.steps_at_floor, strict=True) if steps >= PATIENCE]
            rank_zero_warn(
                f"GradNorm has held the weights of {stuck} at the lower clamp, min_weight={self.min_weight}, for "
                f"{PATIENCE} steps in a row by step {signals.step}: their gradients are too long for larger weights. "
                "Scale these tasks' losses, or lower min_weight or lr."
            )
