"""What stays in force around hooks that users override."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer

from lightning_mtl.training.schedulers import for_manual_optimization, parse_optimizer_config

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

Hook = TypeVar("Hook", bound=Callable[..., Any])


def keeping_schedules(configure: Hook) -> Hook:
    """Let ``configure_optimizers`` also remember what schedulers follow; Lightning drops it in manual optimization."""

    @functools.wraps(configure)
    def configure_optimizers(self: MultiTaskModule) -> Any:  # noqa: ANN401 - any of the forms that Lightning takes
        depth = self.__dict__.setdefault("_configuring", 0)
        self.__dict__["_configuring"] = depth + 1
        try:
            returned = configure(self)
        finally:
            self.__dict__["_configuring"] = depth
        if depth or self._trainer is None:  # a call of super(), or by hand
            return returned
        optimizer, self.schedules = parse_optimizer_config(returned)
        return returned if self.automatic_optimization else for_manual_optimization(optimizer, self.schedules)

    return cast("Hook", configure_optimizers)


def putting_rates_back(step: Hook) -> Hook:
    """Let ``optimizer_step`` of automatic optimization leave the learning rates as it found them."""

    @functools.wraps(step)
    def optimizer_step(
        self: MultiTaskModule,
        epoch: int,
        batch_idx: int,
        optimizer: LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the hook returns
        with self.optimization.steering.groups.putting_back(optimizer.optimizer):
            return step(self, epoch, batch_idx, optimizer, optimizer_closure)

    return cast("Hook", optimizer_step)


def with_recorder(configure: Hook) -> Hook:
    """Let ``configure_callbacks`` also bring the recorder along, once."""

    @functools.wraps(configure)
    def configure_callbacks(self: MultiTaskModule) -> list[pl.Callback]:
        _keep_schedules_of_instance(self)
        brought = configure(self)
        callbacks = [brought] if isinstance(brought, pl.Callback) else list(brought)
        return callbacks if self.recorder in callbacks else [*callbacks, self.recorder]

    return cast("Hook", configure_callbacks)


def _keep_schedules_of_instance(module: MultiTaskModule) -> None:
    """Wrap what LightningCLI puts on the instance for ``--optimizer`` and ``--lr_scheduler``, past the class."""
    own = vars(module).get("configure_optimizers")
    if own is not None and not hasattr(own, "keeps_schedules"):
        wrapped = functools.partial(keeping_schedules(lambda _: own()), module)
        wrapped.keeps_schedules = True  # type: ignore[attr-defined]
        module.configure_optimizers = wrapped  # type: ignore[method-assign]
