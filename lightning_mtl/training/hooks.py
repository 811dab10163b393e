"""The training step's own callbacks begin and end a fit, an epoch and an evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.gradients.torch_internals import times_written
from lightning_mtl.method.base import weighting_of
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.absent import forget_absent
from lightning_mtl.training.checks import check_evaluation_loaders
from lightning_mtl.training.step import Optimization
from lightning_mtl.training.targets import measure_targets
from lightning_mtl.training.whole import gather_whole, shard_again


class StepHooks(Callback):
    """Begins a fit anew; the module brings it along.

    Args:
        optimization: What takes the steps.
    """

    def __init__(self, optimization: Optimization) -> None:
        self.optimization = optimization

    def setup(self, trainer: pl.Trainer, pl_module: TaskModule, stage: str) -> None:  # type: ignore[override]
        """Tell Lightning how many micro-batches a step has, as its own callbacks do that change the number.

        Its estimate of a training's steps, its loggers' axis and its learning-rate finder go by it.
        """
        pl_module._trunk_parts = None  # of the trunk as it is now
        if stage == "fit":
            if pl_module._compiler_ctx is not None:
                raise _compiled_whole(pl_module)
            if pl_module.sharing is not None:  # a resumed run restores it after this
                pl_module.sharing.reset()
            self._follow(trainer, pl_module)

    def _follow(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:
        pl_module._trunk_parts = None
        if not pl_module.automatic_optimization:
            trainer.accumulate_grad_batches = pl_module.accumulate_grad_batches

    def teardown(self, trainer: pl.Trainer, pl_module: TaskModule, stage: str) -> None:  # type: ignore[override]
        """Leave the Trainer as it was: it may fit another module."""
        if stage == "fit" and not pl_module.automatic_optimization:
            trainer.accumulate_grad_batches = 1  # what it had: other numbers are refused

    def on_exception(self, trainer: pl.Trainer, pl_module: TaskModule, exception: BaseException) -> None:  # type: ignore[override]
        """Leave the Trainer as it was."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Look at who takes part, and forget what an earlier fit left unfinished."""
        self.optimization.begin(pl_module)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Measure the targets that are to be standardized before the first prediction."""
        measure_targets(pl_module, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Measure the targets where no sanity check came before."""
        measure_targets(pl_module, trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Follow a module that changes its number of micro-batches; not in an epoch in which nothing is trained."""
        if not trainer.fit_loop._skip_backward:
            self._follow(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: TaskModule,  # type: ignore[override]
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Refuse a training step that replaces the module's own, and losses that pass standardized units by.

        Raises:
            ValueError: If the first batch has passed without a step of the module's, or so computed a loss; or if a
                subclass has changed a loss that was trained already.
        """
        returned, self.optimization.update.returned = self.optimization.update.returned, None
        if returned is not None and isinstance(outputs, Mapping):
            _check_unchanged(pl_module, outputs.get("loss"), returned)
        if pl_module.target_units:
            pl_module.target_units.check_used(self.optimization.recorder.latest_tasks)
        if self.optimization.ran or batch is None or _names_the_step(pl_module):
            return
        raise _replaced(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Refuse a training step that has never come to the module's own.

        Raises:
            ValueError: If an epoch has passed without one.
        """
        if not self.optimization.ran and _is_replaced(pl_module):
            raise _replaced(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Refuse loaders whose figures would be mixed up; make a sharded module without a trunk whole."""
        gather_whole(pl_module)
        check_evaluation_loaders(pl_module, "validation_step", trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Refuse loaders whose figures would be mixed up; make a sharded module without a trunk whole."""
        gather_whole(pl_module)
        check_evaluation_loaders(pl_module, "test_step", trainer.test_dataloaders)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Make a sharded module without a trunk whole."""
        gather_whole(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Shard again what was whole."""
        shard_again(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Shard again what was whole."""
        shard_again(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Shard again what was whole."""
        shard_again(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Say how many steps were skipped, and what does not come back from processes that Lightning has started."""
        if (skipped := self.optimization.update.skipped) > 1:  # a single one was told of when it came
            rank_zero_warn(f"{skipped} steps of this fit were skipped, for a loss or a gradient was not finite.")
        weighting = weighting_of(trainer)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and weighting and weighting.state_dict():
            rank_zero_warn(
                f"{type(weighting).__name__} was trained in processes of its own (strategy ddp_spawn, ddp_fork or "
                "ddp_notebook), from which Lightning brings back the model's weights alone: the object that you hold "
                "has not the trained state. Load it from a checkpoint, or use strategy='ddp'."
            )


class AutomaticStepHooks(StepHooks):
    """Finishes, in automatic optimization, the steps that Lightning passes backward and takes."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Finish the gradients of a window that is complete."""
        update, cast = self.optimization.update, self.optimization.cast
        if update.awaited is None:
            return
        forget_absent(pl_module, update.awaited, cast)
        update.awaited.gradients = None
        update.awaited = None


def _compiled_whole(module: TaskModule) -> ValueError:
    parts = "what task_losses calls, by self.net.compile() for instance"
    if module.the_trunk is not None:
        parts = "module.trunk.compile(), and head.compile() for each of module.heads.values()"
    return ValueError(
        f"torch.compile({type(module).__name__}) makes one operation of all that its forward computes, and the tasks "
        "cannot be told apart in it: a parameter that a task does not reach gets zeros from it, and is moved by weight "
        f"decay and momentum, instead of no gradient. Compile the parts: {parts}. Whole, it may validate, test and "
        "predict."
    )


def _check_unchanged(module: TaskModule, given: object, returned: Tensor) -> None:
    """Refuse another loss than ``super().training_step`` returned, in manual optimization.

    The same numbers may come back as a copy; what lies in the same memory is known without a look at the device.
    """
    if not isinstance(given, Tensor) or (given.device, given.shape) != (returned.device, returned.shape):
        return
    if given.data_ptr() == returned.data_ptr():
        changed = times_written(returned) > 0 and _is_replaced(module)
    else:
        changed = not torch.isclose(given, returned.to(given), equal_nan=True)
    if changed:
        raise ValueError(
            f"{type(module).__name__}.training_step returns another loss, {float(given):.6g}, than "
            "super().training_step did, by which parameters have moved already: what is added afterwards trains "
            "nothing. Put further terms into task_losses, or into penalties(), which have weight 1, or set "
            "automatic_optimization = True; return other figures under other keys than 'loss'."
        )


def _is_replaced(module: TaskModule) -> bool:
    """Whether a module has a ``training_step`` from outside of this package."""
    step = inspect.unwrap(module.training_step)
    return str(step.__module__).partition(".")[0] != __name__.partition(".")[0]


def _names_the_step(module: TaskModule) -> bool:
    """Whether the code of ``training_step`` speaks of the module's own, which it may do without for a single batch."""
    code = getattr(inspect.unwrap(module.training_step), "__code__", None)
    return code is not None and "training_step" in code.co_names


def _replaced(module: TaskModule) -> ValueError:
    return ValueError(
        f"{type(module).__name__}.training_step replaces the module's own, so that nothing weighs or trains the tasks; "
        "override task_losses(batch) to compute the losses instead, or call super().training_step(batch, "
        "batch_idx)."
    )
