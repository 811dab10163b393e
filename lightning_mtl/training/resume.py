"""A resumed run first does what was due when its checkpoint was written, which Lightning leaves out.

A checkpoint may be written after a batch (``every_n_train_steps``), in a validation or at an epoch's end. Lightning
goes on with the next batch. Where the batch was an epoch's last, that skips the epoch's end, its validation and the
hooks at the next epoch's begin; with a loader that saves its place it skips a whole epoch, because the loader stands at
the old one's end. Whatever changes the training in one of these hooks would then differ from the uninterrupted run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.step import Optimization

_METRICS = "lightning_mtl_metrics"  # in a checkpoint: what schedulers and callbacks follow
_SHARING = "lightning_mtl_sharing"  # in a checkpoint: which tasks reached which parameters
_OPEN = "lightning_mtl_open_step"  # in a checkpoint: how many micro-batches of an unfinished step it lacks


class Resume(Callback):
    """Lets a resumed run do what the uninterrupted one did; the module brings it along.

    Args:
        optimization: What takes the steps.
    """

    def __init__(self, optimization: Optimization) -> None:
        self.optimization = optimization
        self._warned = False
        self._metrics: dict[str, torch.Tensor] = {}  # the Trainer's, when the checkpoint was written

    def setup(self, trainer: pl.Trainer, pl_module: TaskModule, stage: str) -> None:  # type: ignore[override]
        """Make the module double where it trains so: Lightning would load a checkpoint into float32 first."""
        self._warned = False
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()

    def on_train_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Let what follows a metric find the newest one, and do what was due when the checkpoint was written."""
        trainer.callback_metrics.update(self._metrics)
        self._metrics = {}
        catch_up(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Name the checkpoint where it is the reason: torch speaks of an archive, and not of which."""
        path = Path(str(trainer.ckpt_path or ""))
        if path.is_file() and _is_cut_off(path):
            rank_zero_warn(f"The checkpoint {path} is cut off: it cannot be read. Resume from an earlier one.")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: TaskModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Keep the metrics, as Lightning does not; mark a checkpoint that lacks the gradients of an open step."""
        metrics = trainer.callback_metrics
        checkpoint[_METRICS] = {name: torch.as_tensor(value).detach().clone() for name, value in metrics.items()}
        if pl_module.sharing is not None:
            checkpoint[_SHARING] = pl_module.sharing.state(pl_module, list(pl_module.tasks))
        window = self.optimization.window
        if window is None:
            return
        checkpoint[_OPEN] = window.micro_batches
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"A checkpoint is written inside optimizer step {window.step}, after {window.micro_batches} of its "
                f"{window.size} micro-batches. It does not hold their gradients: a run that resumes from it takes this "
                "step without them. To resume to the bit, save between steps: with every_n_train_steps, or validate "
                "after a multiple of accumulate_grad_batches batches."
            )

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: TaskModule,  # type: ignore[override]
        checkpoint: dict[str, Any],
    ) -> None:
        """Read the metrics; warn of a checkpoint that was written inside an optimizer step."""
        self._metrics = checkpoint.get(_METRICS, {})
        if pl_module.sharing is not None and _SHARING in checkpoint:
            pl_module.sharing.load(checkpoint[_SHARING], pl_module, list(pl_module.tasks))
        if _OPEN in checkpoint:
            rank_zero_warn(
                f"The checkpoint was written inside optimizer step {checkpoint['global_step']}: the gradients of its "
                f"first {checkpoint[_OPEN]} micro-batches are lost, and the step is taken without them. To resume to "
                "the bit, use a checkpoint that was written between steps."
            )


def _is_cut_off(path: Path) -> bool:
    """Whether a file of torch lacks its end, where an archive lists what it holds."""
    with path.open("rb") as file:
        begin = file.read(2)
    return begin in (b"", b"PK") and not zipfile.is_zipfile(path)


def catch_up(trainer: pl.Trainer) -> None:
    """Bring a resumed Trainer to where the next batch, or the next epoch, begins.

    Called in ``on_train_start``, when Lightning has restored its loops and decided where to go on, but has not begun.
    """
    fit: Any = trainer.fit_loop
    epochs = fit.epoch_progress
    if not fit.is_resuming:
        return
    if fit.restarted_on_epoch_start:
        # Written inside the hooks of an epoch's begin, which come again: Lightning would count the epoch only once.
        epochs.total.ready -= 1
        _leave_epoch(fit)
    elif fit.restarted_mid_epoch:
        # While its flag is up, Lightning steps no schedulers that follow an epoch's metric; we have the metric.
        fit._restarting = False
        _go_on(trainer)
    elif fit.resumed_on_epoch_end:
        epochs.current.completed -= 1  # the epoch that they count
        fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epochs.current.completed += 1
    elif trainer.max_steps != -1 and epochs.total.processed == epochs.total.ready:
        # Where steps are counted Lightning takes any checkpoint for one from inside an epoch; this one has ended.
        if epochs.total.completed < epochs.total.processed:
            fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        for count in (epochs.total, epochs.current):
            count.completed = count.processed
        _leave_epoch(fit)


def _go_on(trainer: pl.Trainer) -> None:
    """Do what is due in the middle of an epoch: after a batch, in a validation, after the last batch."""
    fit: Any = trainer.fit_loop
    loop, batches = fit.epoch_loop, fit.epoch_loop.batch_progress
    last, after_batch = batches.is_last_batch, loop.restarted_on_train_batch_end
    if after_batch and last:
        # Lightning has just counted the epoch as finished; its end comes first.
        batches.increment_completed()
        for count in (fit.epoch_progress.total, fit.epoch_progress.current):
            count.processed -= 1
            count.completed -= 1
    due = loop._should_check_val_fx(fit._data_fetcher)
    if (after_batch and due) or (not after_batch and _is_validating(loop.val_loop)):
        _validate(trainer)
    elif due and not last:
        # Lightning counts this batch as it passes over its validation, unless it was counted before, by SIGTERM.
        loop._batches_that_stepped = min(loop._batches_that_stepped, _steps_before(trainer))
    if after_batch or last:  # elsewhere Lightning comes by this line itself
        loop.update_lr_schedulers("step", update_plateau_schedulers=True)
    if last:
        loop._batches_that_stepped += 1
        fit.on_advance_end()
        _leave_epoch(fit)


def _steps_before(trainer: pl.Trainer) -> int:
    """How many batches had stepped before the present one."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step - 1
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1


def _is_validating(validation: Any) -> bool:  # noqa: ANN401 - Lightning's validation loop
    """Whether the checkpoint was written in the midst of a validation; the figures of its first batches are lost."""
    return validation.batch_progress.current.ready > 0 and not validation.batch_progress.is_last_batch


def _validate(trainer: pl.Trainer) -> None:
    """Validate, from the first batch on, as the uninterrupted run did here."""
    validation: Any = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True


def _leave_epoch(fit: Any) -> None:  # noqa: ANN401 - Lightning's loop over epochs
    """Let no loop take the coming epoch for the rest of the old one, and no loader go on at the old one's end."""
    for loop in (fit, fit.epoch_loop, fit.epoch_loop.val_loop):
        loop.on_iteration_done()
