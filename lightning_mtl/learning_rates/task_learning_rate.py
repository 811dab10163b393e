"""The callback that gives each task a learning rate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.devices import send, widest
from lightning_mtl.learning_rates.factor import Collected, Factor
from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.holder import Holder
from lightning_mtl.method.signals import Signals
from lightning_mtl.method.task_state import Declared
from lightning_mtl.task.module import TaskModule


def multipliers(
    factors: Sequence[Tensor], *, normalize: bool = False, bounds: tuple[float, float] | None = None
) -> Tensor:
    r"""Compute :math:`m_k = \prod_j f_{jk}`, then rescale to a mean of 1, then clamp, the latter two if asked.

    Args:
        factors: Each ``[K]``.
        normalize: Divide by the mean over the tasks, where it is above 0.
        bounds: The smallest and the largest multiplier.

    Returns:
        ``[K]``, float64 where the device of the factors has it; on a device if one of them is.

    Example:
        >>> multipliers([torch.tensor([2.0, 0.5]), torch.tensor([3.0, 1.0])])
        tensor([6.0000, 0.5000], dtype=torch.float64)
    """
    device = next((factor.device for factor in factors if not factor.is_cpu), torch.device("cpu"))
    product = torch.stack([send(factor.detach(), device, widest(device)) for factor in factors]).prod(0)
    if normalize:
        mean = product.mean()
        product = torch.where(mean > 0, product / mean, product)
    return product if bounds is None else product.clamp(*bounds)


class TaskLearningRate(Holder):
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
        normalize: Rescale the multipliers to a mean of 1 over all tasks, so that they shift learning between tasks and
            leave its sum.
        bounds: The smallest and the largest multiplier, applied last; None for no bounds.
        every_n_steps: Compute the multipliers before one optimizer step of n and keep them in between.

    The module calls it, in this order, once an optimizer step: :meth:`current` before the step, then, with what the
    step has shown, the ``observe`` methods. Steps that are skipped are not observed.

    Raises:
        TypeError: If a factor is no :class:`Factor`, or at setup if the module has no tasks.
        ValueError: If an argument is out of its range; at setup if a head shares its group in the optimizer, if the
            Trainer holds several of these, or if ``shares_trunk`` meets an :class:`~lightning_mtl.Aggregator`, whose
            direction has no weights to multiply.

    Example:
        >>> from lightning_mtl.learning_rates import GradientNorm, Importance
        >>> rates = TaskLearningRate([Importance({"age": 0.5}), GradientNorm()], bounds=(0.1, 10))
        >>> [type(factor).__name__ for factor in rates.factors]
        ['Importance', 'GradientNorm']
    """

    key_prefix: ClassVar[str] = "lightning_mtl.TaskRates:"
    takes_any_checkpoint: ClassVar[bool] = True

    def __init__(
        self,
        factors: Factor | Sequence[Factor],
        *,
        shares_trunk: bool = False,
        normalize: bool = False,
        bounds: tuple[float, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        self.factors = [factors] if isinstance(factors, Factor) else list(factors)
        if not self.factors:
            raise ValueError("TaskLearningRate(factors=[]) needs one factor or more, such as Importance({task: 2.0}).")
        for factor in self.factors:
            if not isinstance(factor, Factor):
                raise TypeError(f"TaskLearningRate(factors=...) must hold factors, found {type(factor).__name__}.")
        if len(set(map(id, self.factors))) < len(self.factors):
            raise ValueError("TaskLearningRate(factors=...) holds the same object twice; construct a second one.")
        if bounds is not None and not (0 <= bounds[0] <= bounds[1] and bounds[1] > 0 and math.isfinite(bounds[0])):
            raise ValueError(f"TaskLearningRate(bounds={bounds}) must be (smallest, largest), both at least 0.")
        if every_n_steps < 1:
            raise ValueError(f"TaskLearningRate(every_n_steps={every_n_steps}) must be at least 1.")
        self.shares_trunk, self.normalize, self.every_n_steps = shares_trunk, normalize, every_n_steps
        self.bounds = None if bounds is None else (bounds[0], bounds[1])
        self._step: int | None = None
        for factor in self.factors:
            self.add_child(factor)
        self._declare("multipliers", Declared(torch.tensor(1.0, dtype=torch.float64), task_dims=1, on_cpu=True))
        self.multipliers: Tensor

    def current(self, step: int) -> Tensor:
        """Return the multipliers of this step, ``[K]`` and not waited for; compute them where they are due."""
        if step != self._step:
            if step % self.every_n_steps == 0:
                values = [self._checked(factor) for factor in self.factors]
                self.multipliers = multipliers(values, normalize=self.normalize, bounds=self.bounds)
            self._step = step
        return self.multipliers

    def _checked(self, factor: Factor) -> Tensor:
        values = factor.values().detach()
        if values.shape != (len(self.tasks),) or (values.is_cpu and not _are_factors(values.tolist())):
            raise self._refused(f"{type(factor).__name__}.values returned {values.tolist()}")
        return values

    def check_known(self, found: Sequence[float]) -> None:
        """Refuse multipliers that no learning rate can have; those of a device are known only when a step reads them.

        Raises:
            ValueError: If one is negative or not finite.
        """
        if not _are_factors(found):
            names = " and ".join(type(factor).__name__ for factor in self.factors)
            raise self._refused(f"The factors of {names} multiply to {list(found)}")

    def _refused(self, found: str) -> ValueError:
        return ValueError(f"{found}; {len(self.tasks)} tasks need a finite number each that is not negative.")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the module's tasks; refuse settings that cannot work.

        Raises:
            TypeError: If the module has no tasks.
            ValueError: If the Trainer holds several, or an aggregator, or a factor refuses.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, TaskLearningRate)]
        if len(others) > 1:
            raise ValueError(
                f"The Trainer holds {len(others)} callbacks for tasks' learning rates; give one of them all factors."
            )
        if not isinstance(pl_module, TaskModule):
            raise TypeError(
                f"{type(self).__name__} scales the learning rates of the tasks of a lightning_mtl.MultiTaskModule or "
                f"BalancedModule, found {type(pl_module).__name__}; subclass one of them."
            )
        aggregators = [callback for callback in callbacks if isinstance(callback, Aggregator)]
        if stage == "fit" and self.shares_trunk and aggregators:
            raise ValueError(
                f"TaskLearningRate(shares_trunk=True) multiplies the tasks' weights in the shared gradient, and "
                f"{type(aggregators[0]).__name__} has none; leave shares_trunk False, or take a weighting with weights."
            )
        super().setup(trainer, pl_module, stage=stage)
        if stage == "fit":  # as Lightning makes its optimizers anew; a resumed run restores the state after this
            self.reset(list(pl_module.tasks))

    # What happens, told to the factors.

    @property
    def reads_heads(self) -> bool:
        """Return whether a factor reads the heads' gradient norms."""
        return any(factor.reads_heads for factor in self.factors)

    @property
    def collects(self) -> Mapping[Collected, int]:
        """Return what the factors need from the batches, and the largest number of samples that one of them needs."""
        wanted: dict[Collected, int] = {}
        for factor in self.factors:
            for what, number in factor.collects.items():
                wanted[what] = max(number, wanted.get(what, 0))
        return wanted

    def observe(self, signals: Signals, present: Sequence[int]) -> None:
        """Pass a step's measurements of the present tasks to the factors."""
        with self.only(present):
            for factor in self.factors:
                factor.update(signals)

    def observe_heads(self, norms: Tensor) -> None:
        """Pass the norms of the heads' gradients, ``[K]``, nan for absent tasks, to the factors that read them."""
        for factor in self.factors:
            if factor.reads_heads:
                factor.update_heads(norms)

    def observe_samples(self, what: Collected, values: Tensor) -> None:
        """Pass targets or predicted classes of the same samples, ``[K, n]``, to the factors that need them."""
        for factor in self.factors:
            if what in factor.collects:
                factor.update_samples(what, values)

    # The number of the last step for which multipliers were computed belongs to one fit.

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Reset the state for these tasks, and the factors' state."""
        super().reset(tasks, device)
        self._step = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the state to the module's device."""
        super().on_fit_start(trainer, pl_module)
        self._step = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is of other factors, of other tasks, or of other arguments.
        """
        super().load_state_dict(state_dict)
        self._step = None


def _are_factors(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in values)


def task_rates_of(trainer: pl.Trainer) -> TaskLearningRate | None:
    """Return the callback for tasks' learning rates among a Trainer's callbacks, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, TaskLearningRate)), None)
