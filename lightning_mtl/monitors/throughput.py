"""Measures where the time of a training step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_mtl.devices import finish_queue
from lightning_mtl.monitors.base import Monitor, guarding


class Phases:
    """Splits time into named phases; a phase inside another is not counted for the outer one.

    While nobody listens a phase costs an empty context. While somebody does, a GPU is waited for at each change of
    phase, since its work would otherwise count where the processor happens to wait for it.

    Example:
        >>> phases = Phases()
        >>> phases.listen(torch.device("cpu"))
        >>> with phases.during("outer"), phases.during("inner"):
        ...     pass
        >>> sorted(phases.stop())
        ['inner', 'outer', 'rest']
    """

    def __init__(self) -> None:
        self.listening = False
        """Whether phases are being measured."""
        self.during: Callable[[str], AbstractContextManager[object]] = nullcontext
        """Counts the block that follows for the phase that it is called with."""
        self._device: torch.device | None = None
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def waiting(self, name: str) -> AbstractContextManager[object]:
        """Call :attr:`during`, which changes with each :meth:`listen`, for callers that keep one function."""
        return self.during(name)

    def listen(self, device: torch.device) -> None:
        """Start to measure from zero."""
        self._device, self.listening, self.during = device, True, self._counted
        self._seconds, self._open = {}, ["rest"]
        self._since = self._now()

    def stop(self) -> dict[str, float]:
        """Stop measuring, and return the seconds of each phase and of the rest since :meth:`listen`."""
        self._settle()
        self._device, self.listening, self.during = None, False, nullcontext
        return self._seconds

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            if self.listening:  # or it was stopped from within
                self._settle()
                self._open.pop()

    def _settle(self) -> None:
        """Give the time since the last change to the phase that is under way."""
        now = self._now()
        name = self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device is not None:
            finish_queue(self._device)
        return time.perf_counter()


PHASES = ("data", "forward", "measuring", "solving", "waiting", "backward", "optimizer", "monitors", "rest")


class Throughput(Monitor):
    """Watch how a step's time is shared out between data, model, gradients, solver and waiting.

    Logged at each measured step, as shares of the time from the end of the batch before to the end of the step:

    ========================  =================================================================================
    name                      what it counts
    ========================  =================================================================================
    ``throughput/data``       waiting for the loader, and what other callbacks do between batches
    ``throughput/forward``    the losses
    ``throughput/measuring``  each task's gradient: the heads' backward passes, at ``"trunk"`` the trunk's, too
    ``throughput/solving``    the weighting's own computation
    ``throughput/waiting``    the package's collectives: where a rank waits for a slower one
    ``throughput/backward``   the backward pass of the update, with the averaging that DDP hides in it
    ``throughput/optimizer``  the optimizer's step, and clipping
    ``throughput/monitors``   this and other monitors
    ``throughput/rest``       metrics, loggers, Lightning
    ========================  =================================================================================

    and ``throughput/steps_per_second`` since the last measured step. A share that a step does not have is 0. With
    ``automatic_optimization = True`` backward pass and optimizer are Lightning's, and count to the rest.

    On a GPU the measured step, one of n, waits for the device at each change of phase, or the time would count
    where the processor happens to wait; all other steps run as they would. Each rank looks at itself, rank 0 logs.

    Args:
        every_n_steps: Measure one optimizer step of n.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> Throughput(every_n_steps=100).measures_in(200)
        True
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Throughput(every_n_steps={every_n_steps}) must be at least 1.")
        self.every_n_steps = every_n_steps
        self.shares: dict[str, float] = {}
        self._listens = False
        self._begun = self._trained = 0.0
        self._ended: float | None = None
        self._waited = self._waited_within = 0.0
        self._last: tuple[int, float] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what an earlier fit measured."""
        super().setup(trainer, pl_module, stage)
        self._listens, self._ended, self._last, self._trained = False, None, None, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Start to measure where a step begins that is to be measured."""
        if self.off:
            return
        with guarding([self]):
            now = time.perf_counter()
            waited = 0.0 if self._ended is None else now - self._ended
            self._begun = now - waited
            phases, opens_window = _stepping(pl_module)
            if self._listens:
                self._waited += waited
                self._waited_within += waited
            elif opens_window and self.measures_in(trainer.global_step) and not phases.listening:
                self._listens, self._waited, self._waited_within = True, waited, 0.0
                phases.listen(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Log the shares of a measured step that has ended."""
        if self.off:
            return
        with guarding([self]):
            self._ended = time.perf_counter()
            self._trained += self._ended - self._begun
            phases, opens_window = _stepping(pl_module)
            if self._listens and opens_window:
                self._listens = False
                self._log(trainer, phases.stop())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget when the last batch ended, so that validation does not count as waiting for data."""
        self._ended = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget when the last batch ended, so that the time between two epochs is not counted."""
        self._ended = None

    def _log(self, trainer: pl.Trainer, seconds: dict[str, float]) -> None:
        found = dict.fromkeys(PHASES, 0.0) | seconds
        found["data"] = self._waited
        # What the loop did between a step's micro-batches was noted, too, and is counted as data already.
        found["rest"] = max(0.0, found["rest"] - self._waited_within)
        total = sum(found.values())
        self.shares = {phase: spent / total for phase, spent in found.items()}
        scalars = {f"throughput/{phase}": torch.tensor(share) for phase, share in self.shares.items()}
        if self._last is not None:
            step, trained = self._last
            rate = (trainer.global_step - step) / (self._trained - trained)
            scalars["throughput/steps_per_second"] = torch.tensor(rate)
        self._last = trainer.global_step, self._trained
        trainer._logger_connector.log_metrics(scalars)


def _stepping(pl_module: Any) -> tuple[Phases, bool]:  # noqa: ANN401 - a module of the layer above, which has both
    """Return the phases of the module's steps, and whether its next micro-batch begins an optimizer step."""
    return pl_module.optimization.phases, pl_module.opens_window
