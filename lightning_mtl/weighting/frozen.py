"""Frozen takes the mean of another method's first weights, and keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.wrapper import Wrapper


class Frozen(Wrapper):
    r"""Weigh by any other method for some steps, then by the mean of these weights, which costs nothing any more.

    .. math:: w(t) = \hat w(t) \;\text{ for } t \le n, \qquad w(t) = \frac{1}{n} \sum_{s \le n} \hat w(s)
        \;\text{ for } t > n

    with :math:`\hat w` the wrapped method's weights; of each task the steps count in which it had a gradient. After n
    steps nothing is measured any more, and a step costs what fixed weights cost. What the wrapped method had for the
    heads alone stays as it was then. A task that had no weight in the first n steps has the mean of the others'.

    When: another method's weights settle early. Later steps then cost what fixed weights do.

    Args:
        weighting: The method to follow, constructed without ``importance``, ``start_step`` and ``total``.
        steps: n, the optimizer steps, from ``start_step`` on, in which it is followed.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``steps`` is below 1, or ``weighting`` has an argument that belongs here.
        TypeError: If ``weighting`` is no weighting, or finds its weights from whole gradients or none at all.

    Source: after AutoScale, Yang et al., Linear Scalarization Guided by Multi-Task Optimization Metrics, 2025,
    arXiv:2508.13979, whose first phase follows a method and whose second has fixed weights.

    Deviations: AutoScale takes its fixed weights from metrics of the gradients in the first phase; here they are the
    plain mean of a method's own.

    Example:
        >>> from lightning_mtl.weighting import MGDA
        >>> Frozen(MGDA(at="features"), steps=500).steps
        500
    """

    search_space: ClassVar[SearchSpace] = {"steps": Range(100, 5000, log=True, integer=True)}

    def __init__(self, weighting: Weighting, steps: int = 1000, **common: Unpack[CommonArguments]) -> None:
        super().__init__(weighting, **common)
        if steps < 1:
            raise ValueError(f"Frozen(steps={steps}) must be at least 1.")
        self.steps = steps
        self.add_state("mean", torch.tensor(0.0))
        self.add_state("count", torch.tensor(0))
        self.add_state("taken", torch.tensor(0), per_task=False)
        self.mean: Tensor
        self.count: Tensor
        self.taken: Tensor
        self._taken = 0  # the same, for a look that does not wait for a device
        self._coming: tuple[int, Tensor] | None = None  # the step, and its weights

    @property
    def is_frozen(self) -> bool:
        """Whether the weights are constant from now on."""
        return self._taken >= self.steps

    def measures_in(self, step: int) -> bool:
        """Look at no step once the weights are constant."""
        return not self.is_frozen and super().measures_in(step)

    def known_beforehand(self, step: int) -> bool:
        """Know the constant weights at a step's first micro-batch."""
        return self.is_frozen or super().known_beforehand(step)

    def current_weights(self, signals: Signals, present: Sequence[int], *, measured: bool) -> Tensor:
        """Follow the other method, or keep the mean."""
        if not self.is_frozen or signals.step < self.start_step:
            return super().current_weights(signals, present, measured=measured)
        self._idle, self._heads = [], None
        with self._cut_to(present):
            kept = self._kept().to(signals.losses)
        return self.with_importance(self._with_total(kept), signals)

    def weigh(self, signals: Signals) -> Tensor:
        """Follow the other method; inside of a third one, keep the mean here."""
        if self.is_frozen:
            return self._kept()
        weights = self.newest(signals)
        self._coming = signals.step, weights
        return weights

    def update(self, signals: Signals) -> None:
        """Count the step and its weights, and let the other method update its state."""
        if self.is_frozen:
            return
        if self._coming is not None and self._coming[0] == signals.step:  # measured, and not skipped
            self.count = self.count + 1
            self.mean = self.mean + (self._coming[1].to(self.mean) - self.mean) / self.count
        super().update(signals)
        self._go_on(self._taken + 1)

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Begin anew, for these tasks."""
        super().reset(tasks, device)
        self._go_on(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self._go_on(int(self.taken))

    def _kept(self) -> Tensor:
        """The constant weights of the present tasks."""
        known = self.count > 0
        others = torch.where(known.any(), (self.mean * known).sum() / known.sum(), 1.0)
        return torch.where(known, self.mean, others)

    def _go_on(self, taken: int) -> None:
        self._taken, self.taken = taken, torch.full_like(self.taken, taken)
        self.wants_losses_after = self.weighting.wants_losses_after and not self.is_frozen
