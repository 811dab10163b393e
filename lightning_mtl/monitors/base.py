"""The base class of monitors, and the guard that keeps a failing monitor from stopping a training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_mtl.devices import finish_queue
from lightning_mtl.method.arguments import GivenArguments
from lightning_mtl.method.signals import Signals
from lightning_mtl.task import Task
from lightning_mtl.task.module import TaskModule

PLACES = ("trunk", "features", "last_layer")
# A monitor is judged slow only once it has taken this long in all: less is nothing beside a training.
_SLOW_SECONDS = 30.0


class Monitor(GivenArguments, Callback):
    """Reads the measurements of optimizer steps and changes nothing in the training.

    The module calls :meth:`observe`. What goes wrong in there never stops the training: the monitor is turned off, with
    one warning. So is a monitor that has taken 30 seconds in all and more than :attr:`most_time` of the time since it
    was first called. Where several processes train, one that measures gradients is then turned off on all of them.

    Raises:
        TypeError: At setup, if the module is no :class:`~lightning_mtl.BalancedModule`.
        ValueError: At setup, if it measures gradients at a module that there is not, or of a sharded trunk (FSDP2).

    Example:
        >>> class Largest(Monitor):
        ...     every_n_steps = 10
        ...
        ...     def observe(self, trainer, pl_module, signals, weights):
        ...         print(signals.tasks[int(signals.losses.argmax())])
    """

    measures: ClassVar[Literal["losses", "gramian"]] = "losses"
    """What :meth:`observe` needs to be in the signals. A Gramian that the step's weighting measures at the same place
    is used; else one more backward pass a task finds it, beside the one that does the update."""
    at: str | Sequence[str] = "trunk"
    """Where gradients are measured, as in :class:`~lightning_mtl.Weighting`."""
    looks_ahead: bool = False
    """Whether :meth:`observe` needs :attr:`Signals.losses_ahead`, too: a forward pass a task."""
    every_n_steps: int = 1
    """Look at one optimizer step of n."""
    most_time: float = 0.5
    """The share of the time that the monitor may take; 1 lets it take all."""
    off: bool = False
    """Whether the monitor has been turned off."""

    _gone: bool = False  # off on all ranks, so that none of them waits for its measurements any more
    _began: float | None = None
    _spent: float = 0.0
    _exact: bool = False  # whether what a device had queued before is kept out of the time

    def __init__(self) -> None:
        # Its signature is that of monitors without a constructor of their own.
        super().__init__()

    def measures_in(self, step: int) -> bool:
        """Return whether the monitor looks at optimizer step ``step``."""
        return step % self.every_n_steps == 0

    def lookahead_rate(self, pl_module: pl.LightningModule) -> float:
        """Return the step size of the trial steps that lead to :attr:`Signals.losses_ahead`.

        Raises:
            TypeError: If a monitor that ``looks_ahead`` does not override it.
        """
        raise TypeError(f"{type(self).__name__} looks ahead without saying how far; implement lookahead_rate.")

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        """Read one optimizer step: the measurements of its accumulation window, and the weights that were applied.

        Gradients that no weighting has measured are those of the window's first micro-batch, and so are the losses and
        tasks that come with them.
        """

    def tasks_of(self, pl_module: pl.LightningModule) -> dict[str, Task]:
        """Return the module's tasks.

        Raises:
            TypeError: If it is no :class:`~lightning_mtl.BalancedModule`.
        """
        if not isinstance(pl_module, TaskModule):
            raise TypeError(
                f"{type(self).__name__} looks at the tasks of a lightning_mtl.BalancedModule or MultiTaskModule, "
                f"found {type(pl_module).__name__}; subclass one of them."
            )
        return pl_module.tasks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse settings that cannot work before training begins; turn the monitor on again for a new fit."""
        name = type(self).__name__
        self.off = self._gone = False
        self._began, self._spent, self._exact = None, 0.0, False
        self.tasks_of(pl_module)
        if self.measures == "losses":
            return
        if isinstance(pl_module, TaskModule):
            pl_module.check_place(name, self.at)
        # A module without a trunk is whole in its steps.
        if isinstance(trainer.strategy, ModelParallelStrategy) and getattr(pl_module, "the_trunk", None) is not None:
            raise ValueError(
                f"{name} measures gradients beside the update, and sharded parameters (FSDP2) have none outside of the "
                "one synchronized backward pass; leave the monitor out, or train with strategy='ddp'."
            )
        if self.at not in PLACES:
            named = [self.at] if isinstance(self.at, str) else list(self.at)
            known = dict(pl_module.named_modules())
            if unknown := [place for place in named if place not in known]:
                raise ValueError(
                    f"{name}(at={self.at!r}) names {unknown}, which the module does not have; use one of {PLACES}, or "
                    "names as in module.named_modules()."
                )


@contextmanager
def guarding(monitors: Sequence[Monitor], device: torch.device | None = None) -> Iterator[None]:
    """Run a block for some monitors: count its time as theirs, and turn them off with a warning if it fails.

    Args:
        monitors: Whose block it is.
        device: Where it computes. What is queued there before the block is charged to them, unless they are near
            being turned off: a wait in each step would cost more than the error.
    """
    if device is not None and any(monitor._exact for monitor in monitors):
        finish_queue(device)
    began = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a monitor does, it must not end a training of days
        for monitor in monitors:
            _turn_off(monitor, f"{type(error).__name__}: {error}")
    finally:
        now = time.perf_counter()
        for monitor in monitors:
            monitor._began = began if monitor._began is None else monitor._began
            monitor._spent += (now - began) / len(monitors)


def turn_off_if_slow(monitor: Monitor, device: torch.device) -> None:
    """Turn a monitor off that has taken too much of the time since it first looked."""
    passed = 0.0 if monitor._began is None else time.perf_counter() - monitor._began
    if monitor._spent > max(_SLOW_SECONDS, monitor.most_time * passed):
        if device.type != "cpu" and not monitor._exact:
            # The time may be the step's own, which the monitor has only waited for: measure anew, and exactly.
            monitor._exact, monitor._began, monitor._spent = True, None, 0.0
            return
        _turn_off(
            monitor,
            f"it took {100 * monitor._spent / passed:.0f} % of the time; raise every_n_steps={monitor.every_n_steps}, "
            f"measure at 'features', or set its most_time={monitor.most_time} higher",
        )


def turned_off_elsewhere(monitor: Monitor) -> None:
    """Turn a monitor off that was turned off on another rank."""
    _turn_off(monitor, "it was turned off on another rank, whose warning has the reason")
    monitor._gone = True


def _turn_off(monitor: Monitor, reason: str) -> None:
    if not monitor.off:
        monitor.off = True
        warnings.warn(f"{type(monitor).__name__} is turned off, training goes on: {reason}.", stacklevel=2)
