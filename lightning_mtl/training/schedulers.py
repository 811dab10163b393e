"""Learning-rate schedulers are stepped here as automatic optimization steps them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from lightning.pytorch.utilities.types import LRSchedulerConfig, LRSchedulerPLType
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.learning_rates.given_rates import check_given_rates, take_given_rates
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.wrapping import Hook

OptimizerCallable = Callable[[Iterable[Any]], torch.optim.Optimizer]
LRSchedulerCallable = Callable[[torch.optim.Optimizer], LRSchedulerPLType]


def parse_optimizer_config(returned: Any) -> tuple[torch.optim.Optimizer, list[LRSchedulerConfig]]:  # noqa: ANN401
    """Read what ``configure_optimizers`` returned, in any form that Lightning takes.

    Raises:
        ValueError: If there is not exactly one optimizer.
    """
    # Lightning's own reading, private as it is, accepts and refuses just what automatic optimization does.
    optimizers, schedulers, monitor = _configure_optimizers(returned)
    if len(optimizers) != 1:
        raise ValueError(
            f"configure_optimizers returned {len(optimizers)} optimizers, a BalancedModule takes one: give it a named "
            "parameter group for each part, "
            'Adam([{"params": trunk, "name": "trunk"}, {"params": heads, "name": "heads", "lr": 1e-4}]), or chain the '
            "optimizers: one torch.optim.Optimizer with all their parameter groups, whose step() steps each of them."
        )
    return optimizers[0], _configure_schedulers_automatic_opt(schedulers, monitor)


def for_manual_optimization(
    optimizer: torch.optim.Optimizer, configs: list[LRSchedulerConfig]
) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """The same configuration without the keys that Lightning drops, with a warning, in manual optimization."""
    kept = ("scheduler", "interval", "frequency", "name")
    return [optimizer], [{key: getattr(config, key) for key in kept} for config in configs]


def step_schedulers(
    module: pl.LightningModule,
    configured: list[LRSchedulerConfig],
    interval: str,
    index: int,
    *,
    plateau: bool,
) -> None:
    """Step the schedulers that are due, as Lightning's automatic loop does after a batch or an epoch.

    Args:
        module: Its trainer holds the schedulers.
        configured: What the user asked for; Lightning's copies have lost what manual optimization does not support.
        interval: ``"step"`` or ``"epoch"``.
        index: The batch's place in its epoch, or the epoch.
        plateau: Step those that follow a metric, or the others.
    """
    trainer = module.trainer
    for active in trainer.lr_scheduler_configs:
        # The learning-rate finder puts a scheduler of its own in place of the user's.
        config = next((asked for asked in configured if asked.scheduler is active.scheduler), active)
        if config.reduce_on_plateau != plateau or config.interval != interval or (index + 1) % config.frequency:
            continue
        value = None
        if plateau:
            value = trainer.callback_metrics.get(config.monitor or "")
            if value is None:
                if config.strict:
                    raise MisconfigurationException(
                        f"ReduceLROnPlateau follows {config.monitor!r}, which has not been logged; there are "
                        f"{sorted(trainer.callback_metrics)}. Log it in the training or validation step, choose one of "
                        "these as `monitor`, or set `strict` to False to skip the update."
                    )
                rank_zero_warn(f"ReduceLROnPlateau follows {config.monitor!r}, which has not been logged; skipped.")
                continue
        module.lr_scheduler_step(config.scheduler, value)


class DueSchedulers:
    """Steps a module's schedulers where automatic optimization does; some wait until a metric is logged.

    Attributes:
        waiting: The interval and the index for which those that follow a metric are due.
        after: The newest batch that schedulers were stepped after.
    """

    def __init__(self) -> None:
        self.waiting: tuple[str, int] | None = None
        self.after = -1

    def step(self, module: TaskModule) -> None:
        """Step what is due after a window's last batch."""
        loop = module.trainer.fit_loop.epoch_loop
        step_schedulers(module, module.schedules, "step", loop.batch_idx, plateau=False)
        if module.trainer.is_last_batch:
            step_schedulers(module, module.schedules, "epoch", module.trainer.current_epoch, plateau=False)
        self.waiting, self.after = ("step", loop.batch_idx), loop.total_batch_idx

    def step_outstanding(self, module: TaskModule) -> None:
        """Step what is due after a batch that should have closed a window, and took no step: None, for instance."""
        loop = module.trainer.fit_loop.epoch_loop
        if module.automatic_optimization or not module.trainer.lr_scheduler_configs:
            return
        if self.after != loop.total_batch_idx and not loop._should_accumulate():
            self.step_waiting(module)
            self.step(module)

    def step_waiting(self, module: TaskModule) -> None:
        """Step those that follow a metric, which is logged now, if they are due."""
        if self.waiting is not None:
            due, self.waiting = self.waiting, None
            step_schedulers(module, module.schedules, *due, plateau=True)


def keeping_schedules(configure: Hook) -> Hook:
    """Let ``configure_optimizers`` also remember what schedulers follow; Lightning drops it in manual optimization."""

    @functools.wraps(configure)
    def configure_optimizers(self: TaskModule) -> Any:  # noqa: ANN401 - any of the forms that Lightning takes
        depth = self.__dict__.setdefault("_configuring", 0)
        self.__dict__["_configuring"] = depth + 1
        try:
            returned = configure(self)
        finally:
            self.__dict__["_configuring"] = depth
        if depth or self._trainer is None:  # a call of super(), or by hand
            return returned
        optimizer, self.schedules = parse_optimizer_config(returned)
        if set(self.parameters()).isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
            rank_zero_warn(
                f"The optimizer has no parameter of this {type(self).__name__}, and its steps will move nothing: build "
                "it from the parameters that it is called with, or from self.parameters() in configure_optimizers."
            )
        parts = take_given_rates(optimizer)
        if not parts and self.gives_rates:
            raise ValueError(
                f"The rates that trunk_lr and head_lr give {type(self).__name__} do not reach the optimizer, because "
                "configure_optimizers is not MultiTaskModule's own; build the optimizer there from "
                "self.parameter_groups(lr, trunk_lr=..., head_lr=...), or leave the arguments out."
            )
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        check_given_rates(parts, [config.scheduler for config in self.schedules], callbacks)
        return returned if self.automatic_optimization else for_manual_optimization(optimizer, self.schedules)

    return cast("Hook", configure_optimizers)
