"""DTP weighs by how badly each task still performs."""

from __future__ import annotations

from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.validated import Validated

# A performance of 0 shall have a large weight, and no infinite one.
SMALLEST = 1e-6


def dtp_weights(performance: Tensor, gamma: float) -> Tensor:
    r"""Compute :math:`-(1 - \kappa)^\gamma \log \kappa`, κ clamped to [1e-6, 1]; 1 where κ is nan.

    Example:
        >>> dtp_weights(torch.tensor([0.5, 1.0, torch.nan]), gamma=1.0)
        tensor([0.3466, 0.0000, 1.0000])
    """
    clamped = performance.clamp(SMALLEST, 1.0)
    weights = -((1 - clamped) ** gamma) * torch.log(clamped)
    return torch.where(performance.isnan(), torch.ones_like(weights), weights.abs())


class DTP(Validated):
    r"""Give difficult tasks priority, by a performance metric between 0 and 1: dynamic task prioritization.

    .. math:: w_k = -(1 - \bar\kappa_k)^\gamma \log \bar\kappa_k, \qquad
        \bar\kappa_k \leftarrow \alpha \kappa_k + (1 - \alpha) \bar\kappa_k

    κ is the task's metric, 1 being perfect. A task without a value yet has weight 1.

    When: the metric counts, not the loss, and one task's metric lags.

    Args:
        metric: The metric's name in every task's collection; it must lie in [0, 1] and be better when higher.
        gamma: How much more the difficult tasks count, as in the focal loss; 0 leaves -log κ.
        alpha: The weight of the newest κ.
        stage: ``"val"`` takes κ at the end of each validation, ``"train"`` the metric of each training batch, as the
            paper does; the batch values cost a metric computation a step.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or at setup if a task lacks the metric or it is unbounded.

    Source: Guo et al., Dynamic Task Prioritization for Multitask Learning, ECCV 2018.

    Deviations: the paper moves κ each iteration of training; a validation's value is the less noisy choice and the
    default here. κ is clamped to [1e-6, 1], so that a metric of 0 gives a large weight and no infinite one.

    Example:
        >>> DTP("accuracy", gamma=2.0, alpha=0.5).metric
        'accuracy'
    """

    reads_losses: ClassVar[bool] = False
    without_validation: ClassVar[tuple[str, str]] = ("(stage='val')", "pass one, or use stage='train'")
    search_space: ClassVar[SearchSpace] = {"gamma": Range(0.5, 4.0), "alpha": Range(0.1, 1.0)}

    def __init__(
        self,
        metric: str,
        *,
        gamma: float = 1.0,
        alpha: float = 0.5,
        stage: Literal["val", "train"] = "val",
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(**common)
        if gamma < 0:
            raise ValueError(f"DTP(gamma={gamma}) must be at least 0.")
        if not 0 < alpha <= 1:
            raise ValueError(f"DTP(alpha={alpha}) must be above 0 and at most 1.")
        if stage not in ("val", "train"):
            raise ValueError(f"DTP(stage={stage!r}) must be 'val' or 'train'.")
        self.metric, self.gamma, self.alpha, self.stage = metric, gamma, alpha, stage
        self.step_metric, self.follows_validation = metric if stage == "train" else None, stage == "val"
        self.add_state("performance", torch.tensor(torch.nan))
        self.performance: Tensor

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse tasks without the metric, and metrics that are no performance between 0 and 1."""
        for name, task in pl_module.tasks.items():  # type: ignore[operator,union-attr]  # setup has seen a mapping
            metrics = task.metric_collection()
            if self.metric not in metrics:
                raise ValueError(
                    f"DTP(metric={self.metric!r}) is not among the metrics of task {name!r}, {list(metrics)}; name one "
                    "that every task has, for instance by MetricCollection({'accuracy': ...})."
                )
            found = metrics[self.metric]
            if (found.plot_lower_bound, found.plot_upper_bound, found.higher_is_better) != (0.0, 1.0, True):
                raise ValueError(
                    f"DTP(metric={self.metric!r}) is {type(found).__name__} for task {name!r}, which is no performance "
                    "between 0 and 1 that is better when higher; take accuracy, AUROC, IoU or the like."
                )

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the performance so far."""
        return dtp_weights(self.performance, self.gamma)

    def update(self, signals: Signals) -> None:
        """Take in the batch's performance, where training is watched."""
        if signals.scores is not None:
            self.performance = self._moved(self.performance, signals.scores.to(self.performance))

    def validated(self, scores: dict[str, dict[str, float]]) -> None:
        """Take in the validation's performance."""
        newest = self.performance.new_tensor([scores.get(k, {}).get(self.metric, torch.nan) for k in self.tasks])
        self.performance = self._moved(self.performance, newest)

    def _moved(self, before: Tensor, newest: Tensor) -> Tensor:
        mixed = self.alpha * newest + (1 - self.alpha) * before
        return torch.where(newest.isnan(), before, torch.where(before.isnan(), newest, mixed))
