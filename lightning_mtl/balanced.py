"""BalancedModule is the LightningModule of several losses, of whatever parts; a callback balances them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_mtl.task.names import check_task_names, named_tasks
from lightning_mtl.task.sharing import Sharing
from lightning_mtl.task.task import Task, TaskOutput
from lightning_mtl.task.units import Standardizers
from lightning_mtl.training.arguments import check_factories
from lightning_mtl.training.checks import check_step_arguments
from lightning_mtl.training.evaluation import evaluating
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.module import SteppedModule
from lightning_mtl.training.schedulers import LRSchedulerCallable, OptimizerCallable
from lightning_mtl.training.step import Optimization
from lightning_mtl.trunk import TrunkParts


class BalancedModule(SteppedModule):
    r"""A LightningModule whose step has several losses, balanced by a callback; its parts are its own affair.

    .. math:: \min_\theta \sum_k w_k L_k(\theta)

    An existing LightningModule becomes one by three changes: this base class, ``tasks``, and
    :meth:`task_losses` in place of ``training_step``, which returns the losses by name instead of their sum. The
    weights :math:`w_k` come from the :class:`~lightning_mtl.Weighting` among the Trainer's callbacks; without one all
    are 1.

    Shared parameters, whose gradients the methods balance, are those that the losses of two tasks or more have reached,
    as the autograd graphs of the steps show: found before anything is measured, over all ranks, and looked for until
    all parameters are shared. A parameter that only one task reaches is trained as a head is. Override
    :meth:`shared_parameters` to say it instead.

    Args:
        tasks: The names of the losses, or ``{name: Task}`` where they have metrics or baselines.
        accumulate_grad_batches: Micro-batches an optimizer step; what the Trainer's argument of this name does in
            automatic optimization.
        gradient_clip_val: Clip gradients to this norm, or value, before each optimizer step.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        max_skipped_steps: A step with a loss or gradient that is not finite is skipped; more of them in a row than this
            end the training with an error.
        optimizer: Called with the parameters, returns the optimizer; unused where ``configure_optimizers`` is
            overridden.
        lr_scheduler: Called with the optimizer, returns a scheduler stepped once an epoch.

    Raises:
        ValueError: If a name cannot name a task, or a number is out of its range.
        TypeError: If an argument is of the wrong kind, or a subclass has no ``task_losses``.

    Example:
        >>> class Decay(BalancedModule):
        ...     def __init__(self):
        ...         super().__init__(["residual", "initial"])
        ...         self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        ...
        ...     def task_losses(self, t):
        ...         t = t.requires_grad_()
        ...         u = self.net(t)
        ...         (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        ...         initial = self.net(torch.zeros(1, 1)) - 1
        ...         return {"residual": (du + u).square().mean(), "initial": initial.square().mean()}
        >>> sorted(Decay().task_losses(torch.rand(8, 1)))
        ['initial', 'residual']
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, Task],
        *,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        max_skipped_steps: int = 100,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.tasks = named_tasks(type(self).__name__, tasks)
        check_task_names(self.tasks)
        check_step_arguments(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)
        check_factories(optimizer, lr_scheduler)
        if type(self).task_losses is BalancedModule.task_losses:
            raise TypeError(
                f"{type(self).__name__} has no task_losses(batch): define it, returning {{task: loss}} for the tasks "
                f"{list(self.tasks)}; what was training_step(batch, batch_idx) becomes it."
            )
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.max_skipped_steps = max_skipped_steps
        self.recorder = Recorder(self.tasks)
        self.schedules: list[LRSchedulerConfig] = []
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self._trunk_lr, self._head_lr = None, {}
        self.optimization = Optimization(self.recorder)
        self.sharing = Sharing() if type(self).shared_parameters is BalancedModule.shared_parameters else None
        self._hold(self._standardizers())

    def _hold(self, units: Standardizers) -> None:
        """Hold what the tasks bring along, behind the model's own parts."""
        # A loss with buffers or parameters of its own moves with the module and is saved with it.
        losses = {k: task.loss for k, task in self.tasks.items() if isinstance(task.loss, nn.Module)}
        held: dict[str, nn.Module] = {"target_units": units, "loss_modules": nn.ModuleDict(losses)}
        for stage in ("train", "val", "test"):
            metrics = {k: task.metric_collection() for k, task in self.tasks.items() if task.metrics is not None}
            held[f"{stage}_task_metrics"] = nn.ModuleDict(metrics)
        for name, module in held.items():
            if name in self._modules:
                del self._modules[name]
            setattr(self, name, module)

    def _standardizers(self) -> Standardizers:
        if wrong := [name for name, task in self.tasks.items() if task.standardize is not False]:
            raise ValueError(
                f"Task(standardize=...) of {wrong} has a head predict in other units than the targets', and "
                f"{type(self).__name__} has no heads: standardize in task_losses, give Task(loss_scale=...), or use a "
                "MultiTaskModule."
            )
        return Standardizers({}, {})

    @property
    def trunk_parts(self) -> TrunkParts:
        """What a trunk says of itself: nothing, for there is none."""
        if self._trunk_parts is None:
            self._trunk_parts = TrunkParts(nn.Module(), self.tasks)
        return self._trunk_parts

    # The losses

    def task_losses(self, batch: Any) -> Mapping[str, Tensor | TaskOutput]:  # noqa: ANN401 - whatever the loader yields
        """Compute the loss of each task: what a subclass defines.

        Args:
            batch: What the loader yields. :class:`~lightning_mtl.data.MultiTaskDataModule` yields a dict with a batch
                of each of its data sets, under their names.

        Returns:
            ``{task: loss}``, each loss a scalar tensor, or a :class:`~lightning_mtl.TaskOutput` to have metrics and
            exact means, too. A task that the batch says nothing about is left out.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define task_losses(batch).")

    def penalties(self) -> dict[str, Tensor]:
        """Scalars added to the objective with weight 1, logged as ``penalty/<name>``; they are no tasks to balance."""
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that tasks share, whose gradients the methods balance.

        By default those that two tasks or more have reached in this fit so far; none before its first step.
        """
        return [] if self.sharing is None else self.sharing.among(self.parameters())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        """Predict a batch: ``self(batch)``; with autograd on where ``evaluate_with_gradients`` says so."""
        with evaluating(self, batch) as given:
            return apply_to_collection(self(given), Tensor, Tensor.detach)
