"""Monitors the affinity of tasks: how much a step for one task lowers another's loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.method.signals import Signals
from lightning_mtl.monitors.grouping import best_grouping
from lightning_mtl.monitors.pairs import PairMonitor


def first_order_affinity(gramian: Tensor, losses: Tensor, lr: float) -> Tensor:
    r"""Estimate the inter-task affinity from inner products of gradients.

    .. math:: Z_{i \to j} = 1 - \frac{L_j(\theta - \eta g_i)}{L_j(\theta)} \approx \eta \, \frac{g_i \cdot g_j}{L_j}

    Args:
        gramian: ``[K, K]``, the inner products g_i · g_j.
        losses: ``[K]``, L_j.
        lr: The step size η.

    Returns:
        ``[K, K]``, float64 on the CPU: row i, column j is what a step for task i does for task j. Not a number in the
        column of a task whose loss is not above 0.

    Example:
        >>> first_order_affinity(torch.tensor([[4.0, -2.0], [-2.0, 4.0]]), torch.tensor([1.0, 2.0]), lr=0.1)
        tensor([[ 0.4000, -0.1000],
                [-0.2000,  0.2000]], dtype=torch.float64)
    """
    return lr * gramian.detach().cpu().double() / _positive(losses)


def lookahead_affinity(losses_ahead: Tensor, losses: Tensor) -> Tensor:
    r"""Compute the inter-task affinity from losses after a trial step for each task.

    .. math:: Z_{i \to j} = 1 - \frac{L_j(\theta - \eta g_i)}{L_j(\theta)}

    Args:
        losses_ahead: ``[K, K]``, in row i the losses of all tasks after a step for task i.
        losses: ``[K]``, the losses before.

    Returns:
        As :func:`first_order_affinity`.

    Source: Fifty et al., Efficiently Identifying Task Groupings for Multi-Task Learning, 2021, arXiv:2109.04617.

    Example:
        >>> lookahead_affinity(torch.tensor([[0.5, 2.2], [1.1, 1.0]]), torch.tensor([1.0, 2.0]))
        tensor([[ 0.5000, -0.1000],
                [-0.1000,  0.5000]], dtype=torch.float64)
    """
    return 1 - losses_ahead.detach().cpu().double() / _positive(losses)


def _positive(losses: Tensor) -> Tensor:
    """The losses that something can be relative to."""
    values = losses.detach().cpu().double()
    return torch.where(values > 0, values, torch.full_like(values, torch.nan))


class TaskAffinity(PairMonitor):
    r"""Watch how much a step for one task lowers the loss of another: which tasks should learn together.

    .. math:: Z_{i \to j} = 1 - \frac{L_j(\theta - \eta \nabla_\theta L_i)}{L_j(\theta)}

    over the shared parameters θ alone. Above 0, a step for i helps j; below 0, it hurts. The first-order form comes
    from inner products of gradients. The exact form tries the step out: one forward pass a task, with the batch and the
    random numbers of the step itself, after which parameters, buffers, plain
    attributes and random numbers are put back to the bit.

    Logged at each measured step are ``affinity/mean`` and ``affinity/lowest`` over the pairs of different tasks; at an
    epoch's end a heatmap, ``affinity/heatmap``, shows the epoch's mean, each column divided by what the task's own step
    does for it. :attr:`affinity` is the mean over the whole training, for :meth:`groups`; :meth:`report` shows it.
    Where some tasks are auxiliary (``Task(role="auxiliary")``), ``affinity/main/<task>`` is the mean of what a step for
    each does for the main tasks, and ``affinity/helped/<task>`` the share of the measured steps so far in which it was
    above 0; :attr:`helped` has the shares. What a measured step costs is said at
    :class:`~lightning_mtl.monitors.GradientConflict`; the exact form adds K forward passes.

    Args:
        every_n_steps: Look at one optimizer step of n.
        at: Where gradients are measured. ``"trunk"`` is the paper's; elsewhere the step is one of these parameters, or
            of the features, alone.
        exact: Try the steps out; needs ``at="trunk"``.
        lr: The step size η; None takes the optimizer's learning rate of the shared parameters, as it is at the step.
        figure: Whether to draw the heatmaps, for TensorBoard; needs matplotlib (the extra ``plot``).
        name: What the logged names begin with.

    Raises:
        ValueError: If an argument is out of its range; at the start of training if the shared parameters have several
            learning rates and no ``lr`` is given; at setup with a sharded trunk (FSDP2).
        ModuleNotFoundError: If matplotlib is missing with ``figure=True``.

    Source: Fifty et al., Efficiently Identifying Task Groupings for Multi-Task Learning, 2021, arXiv:2109.04617.

    Deviations: the trial step is one of plain descent, as in the paper, whatever the optimizer is. A task whose loss
    is not above 0 has no relative change and is left out of the step's means. A ``task_losses`` that logs or counts
    something by itself does so once more for each trial step.

    Example:
        >>> affinity = TaskAffinity(every_n_steps=20, exact=True, lr=0.01, figure=False)
        >>> affinity.looks_ahead
        True
    """

    title: ClassVar[str] = "affinity of tasks"
    from_to: ClassVar[tuple[str, str]] = ("a step for", "changes the loss of")
    caption: ClassVar[str] = "1 is what the task's own step does"

    def __init__(
        self,
        every_n_steps: int = 50,
        at: str | Sequence[str] = "trunk",
        *,
        exact: bool = False,
        lr: float | None = None,
        figure: bool = True,
        name: str = "affinity",
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, at=at, figure=figure, name=name)
        if exact and at != "trunk":
            raise ValueError(f"TaskAffinity(exact=True, at={at!r}) steps along all shared parameters; use at='trunk'.")
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"TaskAffinity(lr={lr}) must be above 0 and finite; None takes the optimizer's.")
        self.looks_ahead = exact
        self.lr = lr

    @property
    def affinity(self) -> Tensor:
        """Return the mean affinities over the training, ``[K, K]``: row i acts on column j, in the order of tasks."""
        return self.whole.mean()

    def readable(self, values: Tensor) -> Tensor:
        """Return each column divided by what the task's own step does for it: numbers around 1, whatever the step."""
        return values / values.diagonal().abs()

    def groups(self, num_groups: int) -> list[list[str]]:
        """Return the at most ``num_groups`` groups of tasks that learn best together, by :func:`best_grouping`."""
        return [[self.tasks[i] for i in group] for group in best_grouping(self.affinity, num_groups)]

    def lookahead_rate(self, pl_module: pl.LightningModule) -> float:
        """Return the step size η."""
        return _learning_rate(pl_module) if self.lr is None else self.lr

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an optimizer that no single step size can be read from."""
        self.lookahead_rate(pl_module)

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        """Log and count this step's affinities."""
        if signals.gramian is None or signals.num_tasks < 2:
            return
        if not self.looks_ahead:
            found = first_order_affinity(signals.gramian, signals.losses, self.lookahead_rate(pl_module))
        elif signals.losses_ahead is not None:
            found = lookahead_affinity(signals.losses_ahead, signals.losses)
        else:
            return
        self.count(found, signals.tasks)
        if 0 < len(self.main) < len(self.tasks):
            main = [position for position, task in enumerate(signals.tasks) if task in self.main]
            self.note_help(pl_module, found[:, main].nanmean(dim=1), signals.tasks)
        beside = found[~torch.eye(len(found), dtype=torch.bool)]
        if len(beside := beside[beside.isfinite()]):
            self.write(pl_module, {"mean": beside.mean(), "lowest": beside.min()})


def _learning_rate(pl_module: Any) -> float:  # noqa: ANN401 - a BalancedModule, which stands above this room
    # What tasks share may not be known before the first step: then it can be any parameter.
    shared = set(pl_module.shared_parameters() or pl_module.parameters())
    groups = pl_module.optimizers().param_groups
    rates = {float(group["lr"]) for group in groups if not shared.isdisjoint(group["params"])}
    if len(rates) != 1:
        raise ValueError(
            f"TaskAffinity(lr=None) takes the optimizer's learning rate of the shared parameters, which have "
            f"{sorted(rates)}; give one: TaskAffinity(lr=...)."
        )
    return rates.pop()
