"""The scales that losses are divided by before a method sees them, and a look at the first losses of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.devices import numbers
from lightning_mtl.task.task import Task

# What a running scale keeps of itself in each step; what a step adds is 1 % of it.
_MOMENTUM = 0.99
# Losses that differ by more are a matter of units, not of tasks that are hard to different degrees.
_FAR_APART = 1e3


class LossScales:
    r"""What each task's loss is divided by, as ``Task(loss_scale=...)`` says: state of a training.

    .. math:: \tilde L_k = L_k / s_k, \qquad \nabla \sum_k w_k \tilde L_k = \sum_k \frac{w_k}{s_k} \nabla L_k

    A number stays what it is. ``"initial"`` is the absolute loss of the task's first micro-batch, over all ranks, that
    is neither 0 nor infinite; ``"running"`` starts there and follows: :math:`s \leftarrow 0.99 s + 0.01 |L|`, after
    each step. Until a scale is known it is 1.

    Args:
        tasks: What was declared of each task.

    Example:
        >>> scales = LossScales({"a": Task(torch.nn.L1Loss(), loss_scale="initial"), "b": Task(torch.nn.L1Loss())})
        >>> scales.learn([0, 1], torch.tensor([4.0, 2.0]))
        >>> scales.of([0, 1])
        tensor([4., 1.])
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._given = [task.loss_scale for task in tasks.values()]
        self.reset()

    @staticmethod
    def of_tasks(tasks: Mapping[str, Task]) -> LossScales | None:
        """The scales of these tasks; None where no task has one."""
        return LossScales(tasks) if any(task.loss_scale is not None for task in tasks.values()) else None

    def reset(self) -> None:
        """Begin a training."""
        numbers = [
            1.0 if given is None else given if isinstance(given, float | int) else torch.nan for given in self._given
        ]
        self.values = torch.tensor(numbers, dtype=torch.float32)
        self._running = torch.tensor([given == "running" for given in self._given])

    def of(self, positions: Sequence[int]) -> Tensor:
        """The scales of some tasks, by their positions among all."""
        values = self.values[self._at(positions)]
        return torch.where(values.isnan(), 1.0, values)

    def learn(self, positions: Sequence[int], losses: Tensor) -> None:
        """Let tasks whose scale is still unknown take it from these losses, over all ranks."""
        if self.values.device != losses.device:
            self.values, self._running = self.values.to(losses.device), self._running.to(losses.device)
        index = self._at(positions)
        known, found = self.values[index], losses.detach().abs().to(self.values)
        usable = known.isnan() & found.isfinite() & (found > 0)
        self.values[index] = torch.where(usable, found, known)

    def follow(self, positions: Sequence[int], losses: Tensor) -> None:
        """Move the running scales by a step's losses, in the tasks' own units."""
        if "running" not in self._given:
            return
        index = self._at(positions)
        known = self.values[index]
        moved = _MOMENTUM * known + (1 - _MOMENTUM) * losses.abs().to(known)
        self.values[index] = torch.where(self._running[index], moved, known)

    def load(self, values: Tensor) -> None:
        """Go on with the scales of an interrupted training."""
        self.values = values.clone().to(self.values)

    def _at(self, positions: Sequence[int]) -> Tensor | slice:
        whole = len(positions) == len(self.values)  # of all tasks, no index has to travel to the device
        return slice(None) if whole else numbers(positions, self.values.device)


def warn_of_units(tasks: Sequence[str], losses: Tensor, weights: Tensor | None) -> None:
    """Look at the losses of a fit's first step; warn of units in which one task drowns another.

    Weights that bridge the gap in this step, fixed ones for instance, keep it quiet.

    Args:
        tasks: Their names.
        losses: ``[K]``, as a method sees them.
        weights: ``[K]``, what multiplied them; None where no weights describe the step.
    """
    rows = torch.stack([losses, losses if weights is None else losses * weights]).abs().tolist()
    seen, weighed = ([size for size in row if 0 < size < torch.inf] for row in rows)
    if not seen or not weighed or min(max(row) / min(row) for row in (seen, weighed)) <= _FAR_APART:
        return
    sizes = dict(zip(rows[0], tasks, strict=True))
    large, small = max(seen), min(seen)
    rank_zero_warn(
        f"In the first step the loss of task {sizes[large]!r} is {large:.2g} and that of task {sizes[small]!r} "
        f"{small:.2g}: units that far apart leave one of them hardly trained. Standardize the targets of a regression, "
        f'Task(standardize=True), or divide a loss by its first value, Task(loss_scale="initial"); most methods bridge '
        "such a gap slowly or not at all."
    )
