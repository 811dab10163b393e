"""The callback that gives each task a learning rate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.learning_rates.base import Collected, TaskRates
from lightning_mtl.learning_rates.factor import Factor
from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.signals import Signals
from lightning_mtl.method.task_state import Declared


def multipliers(
    factors: Sequence[Tensor], *, normalise: bool = False, bounds: tuple[float, float] | None = None
) -> Tensor:
    r"""Compute :math:`m_k = \prod_j f_{jk}`, then rescale to a mean of 1, then clamp, the latter two if asked.

    Args:
        factors: Each ``[K]``.
        normalise: Divide by the mean over the tasks, where it is above 0.
        bounds: The smallest and the largest multiplier.

    Returns:
        ``[K]``, float64, on the CPU.

    Example:
        >>> multipliers([torch.tensor([2.0, 0.5]), torch.tensor([3.0, 1.0])])
        tensor([6.0000, 0.5000], dtype=torch.float64)
    """
    product = torch.stack([factor.detach().cpu().double() for factor in factors]).prod(0)
    if normalise and product.mean() > 0:
        product = product / product.mean()
    return product if bounds is None else product.clamp(*bounds)


class TaskLearningRate(TaskRates):
    r"""Scale the learning rate of each task's head, and if asked the task's share of the trunk's update.

    .. math:: \eta_k = \eta \, m_k, \qquad m_k = \prod_j f_{jk}, \qquad
        \text{with shares\_trunk:} \quad g_{\text{shared}} = \sum_k w_k \, m_k \nabla_\theta L_k

    η is what the optimizer's group of the head has, from whatever scheduler. It is multiplied for the length of the
    optimizer step and put back: nothing compounds, and schedulers, checkpoints and ``LearningRateMonitor`` see η. The
    product is logged as ``lr/<task>``. A step's multipliers come from what the steps before it have shown. What an
    optimizer multiplies by its learning rate, as AdamW its weight decay, is scaled, too.

    Each head needs parameter groups of its own in the optimizer: the module's ``optimizer=`` argument gets them, an
    overridden ``configure_optimizers`` asks :meth:`~lightning_mtl.MultiTaskModule.parameter_groups` for them.

    Args:
        factors: One :class:`Factor` or several, whose product counts.
        shares_trunk: Let the multiplier also scale the task's gradient in the shared parameters. It multiplies the
            weight w_k there, and there alone: the weighting decides as if it did not exist, and the head's gradient
            keeps w_k. A trunk has one learning rate; this is each task's part in it. Under Adam, which forgets the
            scale of a gradient, the tasks' parts relative to each other remain.
        normalise: Rescale the multipliers to a mean of 1 over all tasks, so that they shift learning between tasks and
            leave its sum.
        bounds: The smallest and the largest multiplier, applied last; None for no bounds.
        every_n_steps: Compute the multipliers before one optimizer step of n and keep them in between.

    Raises:
        TypeError: If a factor is no :class:`Factor`.
        ValueError: If an argument is out of its range; at setup if a head shares its group in the optimizer, if the
            Trainer holds several of these, or if ``shares_trunk`` meets an :class:`~lightning_mtl.Aggregator`, whose
            direction has no weights to multiply.

    Example:
        >>> from lightning_mtl.learning_rates import GradientNorm, Importance
        >>> rates = TaskLearningRate([Importance({"age": 0.5}), GradientNorm()], bounds=(0.1, 10))
        >>> [type(factor).__name__ for factor in rates.factors]
        ['Importance', 'GradientNorm']
    """

    def __init__(
        self,
        factors: Factor | Sequence[Factor],
        *,
        shares_trunk: bool = False,
        normalise: bool = False,
        bounds: tuple[float, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        self.factors = [factors] if isinstance(factors, Factor) else list(factors)
        if not self.factors:
            raise ValueError("TaskLearningRate(factors=[]) needs one factor or more, Importance({task: 2.0}) say.")
        for factor in self.factors:
            if not isinstance(factor, Factor):
                raise TypeError(f"TaskLearningRate(factors=...) must hold factors, found {type(factor).__name__}.")
        if len(set(map(id, self.factors))) < len(self.factors):
            raise ValueError("TaskLearningRate(factors=...) holds the same object twice; construct a second one.")
        if bounds is not None and not (0 <= bounds[0] <= bounds[1] and bounds[1] > 0 and math.isfinite(bounds[0])):
            raise ValueError(f"TaskLearningRate(bounds={bounds}) must be (smallest, largest), both at least 0.")
        if every_n_steps < 1:
            raise ValueError(f"TaskLearningRate(every_n_steps={every_n_steps}) must be at least 1.")
        self.shares_trunk, self.normalise, self.every_n_steps = shares_trunk, normalise, every_n_steps
        self.bounds = None if bounds is None else (bounds[0], bounds[1])
        self._step: int | None = None
        self._declare("multipliers", Declared(torch.tensor(1.0, dtype=torch.float64), task_dims=1, on_cpu=True))
        self.multipliers: Tensor

    def current(self, step: int) -> Tensor:
        """The multipliers of this step, computed where they are due."""
        if step != self._step:
            if step % self.every_n_steps == 0:
                values = [self._checked(factor) for factor in self.factors]
                self.multipliers = multipliers(values, normalise=self.normalise, bounds=self.bounds)
            self._step = step
        return self.multipliers

    def _checked(self, factor: Factor) -> Tensor:
        values = factor.values().detach().cpu().double()
        if values.shape != (len(self.tasks),) or not bool((values >= 0).all() and torch.isfinite(values).all()):
            raise ValueError(
                f"{type(factor).__name__}.values returned {values.tolist()}; {len(self.tasks)} tasks need a finite "
                "number each that is not negative."
            )
        return values

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a trunk without weights, and what a factor refuses."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        aggregators = [callback for callback in callbacks if isinstance(callback, Aggregator)]
        if self.shares_trunk and aggregators:
            raise ValueError(
                f"TaskLearningRate(shares_trunk=True) multiplies the tasks' weights in the shared gradient, and "
                f"{type(aggregators[0]).__name__} has none; leave shares_trunk False, or take a weighting with weights."
            )
        for factor in self.factors:
            factor.check(trainer, pl_module)

    # What happens, told to the factors.

    @property
    def reads_heads(self) -> bool:
        """Whether a factor reads the heads' gradient norms."""
        return any(factor.reads_heads for factor in self.factors)

    @property
    def collects(self) -> Mapping[Collected, int]:
        """What the factors want of the batches, and the most that one of them wants."""
        wanted: dict[Collected, int] = {}
        for factor in self.factors:
            for what, number in factor.collects.items():
                wanted[what] = max(number, wanted.get(what, 0))
        return wanted

    def observe(self, signals: Signals, present: Sequence[int]) -> None:
        """Let the factors take in a step's measurements of the present tasks."""
        for factor in self.factors:
            with factor.only(present):
                factor.update(signals)

    def observe_heads(self, norms: Tensor) -> None:
        """Let the factors take in the norms of the heads' gradients."""
        for factor in self.factors:
            if factor.reads_heads:
                factor.update_heads(norms)

    def observe_samples(self, what: Collected, values: Tensor) -> None:
        """Let the factors that want them take in targets or predicted classes."""
        for factor in self.factors:
            if what in factor.collects:
                factor.update_samples(what, values)

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Begin anew, for these tasks."""
        super().reset(tasks, device)
        self._step = None
        for factor in self.factors:
            factor.reset(tasks, device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the state to the module's device."""
        super().on_fit_start(trainer, pl_module)
        self._step = None
        for factor in self.factors:
            factor.on_fit_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the factors that a validation has ended."""
        for factor in self.factors:
            factor.on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the factors that an epoch has ended."""
        for factor in self.factors:
            factor.on_train_epoch_end(trainer, pl_module)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the multipliers and each factor's state."""
        return super().state_dict() | {"factors": [factor.state_dict() for factor in self.factors]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is of other factors, of other tasks, or of other arguments.
        """
        written = [state["weighting"] for state in state_dict["factors"]]
        names = [type(factor).__name__ for factor in self.factors]
        if written != names:
            raise ValueError(
                f"The checkpoint's TaskLearningRate multiplied the factors {written}, this one has {names}; construct "
                "it as in the interrupted run, or load the model's weights alone."
            )
        for factor, state in zip(self.factors, state_dict["factors"], strict=True):
            factor.load_state_dict(state)
        super().load_state_dict(state_dict)
        self._step = None
