"""UncertaintyWeighting weighs by each task's learned noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.learned import LARGEST_LOGARITHM, Learned

Kind = Literal["regression", "classification"]
Regularizer = Literal["log", "log1p"]
FACTORS: Mapping[str, float] = {"regression": 0.5, "classification": 1.0}


def uncertainty_weights(log_variances: Tensor, factors: Tensor) -> Tensor:
    """Compute ``w_k = c_k exp(-s_k)``; arguments and result ``[K]``.

    Example:
        >>> uncertainty_weights(torch.zeros(2), torch.tensor([0.5, 1.0]))
        tensor([0.5000, 1.0000])
    """
    return factors * torch.exp(-log_variances)


def uncertainty_gradient(
    log_variances: Tensor, losses: Tensor, factors: Tensor, regularizer: Regularizer = "log"
) -> Tensor:
    """Compute the objective's derivative by each s_k: ``-c_k exp(-s_k) L_k`` plus the regularizer's; ``[K]``.

    Example:
        >>> uncertainty_gradient(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]))
        tensor([ 0., -1.])
    """
    pull = torch.full_like(log_variances, 0.5) if regularizer == "log" else torch.sigmoid(log_variances)
    return pull - uncertainty_weights(log_variances, factors) * losses


class UncertaintyWeighting(Learned):
    r"""Weigh tasks by the inverse of a learned noise variance.

    .. math:: \min_{\theta, s} \sum_k c_k e^{-s_k} L_k + \tfrac{1}{2} s_k, \qquad s_k = \log \sigma_k^2

    so that :math:`w_k = c_k e^{-s_k}`, with c = 1/2 for regression (a Gaussian likelihood, L the squared error) and
    c = 1 for classification (a softmax scaled by 1/σ²).

    When: losses of unlike scale, where weights may adapt over some hundred steps; say which tasks are
    classifications. A large gap between units takes it thousands of steps: standardize the targets first.

    Args:
        kinds: ``{task: "regression" or "classification"}``; tasks not named are regressions.
        lr: Step size of the Adam that learns s.
        regularizer: ``"log"`` is the paper's :math:`\log \sigma = s / 2`; ``"log1p"`` is :math:`\log(1 + \sigma^2)`,
            which keeps the weights from falling without end.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or a kind is neither of the two, or at setup if ``kinds`` names
            an unknown task.

    Source: Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, 2018, arXiv:1705.07115,
    section 3; the second regularizer: Liebel and Körner, Auxiliary Tasks in Multi-task Learning, 2018,
    arXiv:1805.06334.

    Deviations: the papers learn s with the network's optimizer, here it has an Adam of its own, so that a weight decay
    or a schedule of the network leaves it alone. The step uses s before its own update, as one joint step would.

    Example:
        >>> UncertaintyWeighting({"depth": "regression", "segmentation": "classification"}).kinds["depth"]
        'regression'
    """

    reads_losses: ClassVar[bool] = False
    search_space: ClassVar[SearchSpace] = {
        "lr": Range(1e-3, 1e-1, log=True),
        "regularizer": Choice(("log", "log1p")),
    }
    by_task: ClassVar[tuple[str, ...]] = ("kinds",)

    def __init__(
        self,
        kinds: Mapping[str, Kind] | None = None,
        *,
        lr: float = 0.01,
        regularizer: Regularizer = "log",
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__("log_variances", lr=lr, **common)
        for task, kind in (kinds or {}).items():
            if kind not in FACTORS:
                raise ValueError(f"UncertaintyWeighting calls task {task!r} a {kind!r}; use one of {sorted(FACTORS)}.")
        if regularizer not in ("log", "log1p"):
            raise ValueError(f"UncertaintyWeighting(regularizer={regularizer!r}) must be 'log' or 'log1p'.")
        self.kinds, self.regularizer = dict(kinds or {}), regularizer
        self._factors_of: dict[tuple[str, ...], Tensor] = {}
        self.log_variances: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the variances learned so far."""
        return uncertainty_weights(self.log_variances, self._factors(signals))

    def update(self, signals: Signals) -> None:
        """Take one Adam step on the log-variances."""
        gradient = uncertainty_gradient(
            self.log_variances, signals.losses.to(self.log_variances), self._factors(signals), self.regularizer
        )
        moved = self.descended(self.log_variances, gradient)
        self.log_variances = moved.clamp(-LARGEST_LOGARITHM, LARGEST_LOGARITHM)

    def _factors(self, signals: Signals) -> Tensor:
        factors = self._factors_of.get(signals.tasks)
        if factors is None or factors.device != self.log_variances.device:
            given = {task: FACTORS[kind] for task, kind in self.kinds.items()}
            # The last ones suffice: the tasks are mostly the same from step to step.
            factors = self.of_tasks(given, FACTORS["regression"], signals, self.log_variances)
            self._factors_of = {signals.tasks: factors}
        return factors
