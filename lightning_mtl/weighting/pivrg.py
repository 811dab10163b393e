"""PIVRG shares the step fairly, with preferences for the tasks that lag behind their single-task scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.metrics import delta_m
from lightning_mtl.weighting.fairgrad import fairgrad_weights
from lightning_mtl.weighting.nash_mtl import Bargaining
from lightning_mtl.weighting.validated import Validated

# The official code's: no task counts more than this many times another, and differences below 10 log 2 percentage
# points count less still.
BOUND = 2.0
LEAST_TEMPERATURE = 10.0


def pivrg_preference(drops: Tensor) -> Tensor:
    r"""Compute :math:`K \operatorname{softmax}(\Delta / \tau)` with τ as in :class:`PIVRG`, ``[K]``.

    Args:
        drops: Δ, ``[K]``, in percent; a task without one, nan, counts as the mean of the others.

    Example:
        >>> pivrg_preference(torch.tensor([0.0, 20.0]))
        tensor([0.6667, 1.3333])
    """
    known = drops.nan_to_num(float(drops.nanmean().nan_to_num(0.0)))
    temperature = ((known.max() - known.min()) / math.log(BOUND)).clamp(min=LEAST_TEMPERATURE)
    return len(known) * (known / temperature).softmax(0)


class PIVRG(Validated, Bargaining):
    r"""Share the step fairly among the tasks, more of it to those that validation finds behind their baselines.

    .. math:: G w = \left( \frac{c}{w} \right)^{1 / \alpha}, \qquad
        c = K \operatorname{softmax}\!\left( \frac{\Delta}{\tau} \right), \qquad
        \tau = \max\!\left( \frac{\Delta_{max} - \Delta_{min}}{\ln 2}, 10 \right)

    with :math:`\Delta_k` the relative drop of the task's validation scores from ``Task(baseline=...)``, in percent, as
    in :func:`~lightning_mtl.metrics.delta_m`: no task counts more than twice as much as another. Before the first
    validation c = 1, which is FairGrad, whose solver finds w. Heads follow their own, unweighted losses.

    When: gradients conflict, and validation shows some tasks behind their single-task models.

    Args:
        alpha: α.
        max_norm: Scale the weights so that the shared gradient is at most this long, as the official code does at 1;
            None leaves its length, which grows without bound as gradients shrink.
        preference: ``{task: p}``, relative numbers that multiply c; tasks not named count as 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Attributes:
        stationary_steps: Steps taken at Pareto-stationary points, with the minimum-norm weights.

    Raises:
        ValueError: If an argument is out of its range; at setup if a task has no baseline, ``preference`` names an
            unknown task, or the Trainer has no validation loader.

    Source: Qin et al., Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction,
    CVPR 2025.

    Deviations: the released trainers for two data sets take scores of the test set; here they are validation's. The
    code solves the equation by a bounded least-squares search, with α = 2 alone, multiplies the shared gradient by K
    and clips it to norm 1. A gradient below 1e-5 of the longest counts as zero.

    Example:
        >>> PIVRG(max_norm=1.0).alpha
        2.0
    """

    search_space: ClassVar[SearchSpace] = {
        "alpha": Range(0.5, 5.0, log=True),
        "max_norm": Choice((None, 1.0)),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self,
        alpha: float = 2.0,
        max_norm: float | None = None,
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(max_norm, preference=preference, **common)
        if not 0 < alpha < math.inf:
            raise ValueError(f"PIVRG(alpha={alpha}) must be above 0 and finite.")
        self.alpha = alpha
        self.add_state("drops", torch.tensor(torch.nan), on_cpu=True)
        self.drops: Tensor
        self._baselines: dict[str, list[tuple[str, float, bool]]] = {}  # of each task: metric, score, higher is better

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse tasks without a baseline."""
        for name, task in pl_module.tasks.items():  # type: ignore[operator,union-attr]  # setup has seen a mapping
            if not task.baseline:
                raise ValueError(
                    f"PIVRG compares each task's validation with a baseline, and task {name!r} has none; give it "
                    "Task(baseline={metric: score}), the scores of a model trained on it alone."
                )
            self._baselines[name] = [(m, score, task.higher_is_better(m)) for m, score in task.baseline.items()]

    def weigh(self, signals: Signals) -> Tensor:
        """Solve for this step's Gramian, with the preferences that validation has led to."""
        preference = pivrg_preference(self.drops.double())
        if (given := self.factors(signals)) is not None:
            preference = preference * given
        G = self.needed(signals, "gramian")
        weights, self.stationary = fairgrad_weights(G, self.alpha, self.max_norm, preference)
        return weights

    def validated(self, scores: dict[str, dict[str, float]]) -> None:
        """Compare the validation's scores with the baselines; a task that it lacked keeps its last drop."""
        for position, task in enumerate(self.tasks):
            own = scores.get(task, {})
            if found := [(own[metric], *rest) for metric, *rest in self._baselines[task] if metric in own]:
                self.drops[position] = delta_m(*zip(*found, strict=True))
