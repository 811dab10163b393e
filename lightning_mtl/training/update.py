"""The gradients reach the optimizer here: checked, synchronized, clipped, and followed by the schedulers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.method.signals import Signals
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.schedulers import step_schedulers
from lightning_mtl.training.window import Window

_SILENT: AbstractContextManager[None] = nullcontext()


class Update:
    """The optimizer's part of a step, and the steps that it does without because something is not finite.

    Attributes:
        awaited: The window whose backward pass Lightning is about to run, in automatic optimization.
        drops: Whether the newest step is not to be taken.
        skipped: How many steps were skipped.
        skipped_in_a_row: How many of them were the last ones.
    """

    def __init__(self) -> None:
        self.skipped = self.skipped_in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Begin a fit."""
        self.awaited: Window | None = None
        self.drops = False

    def optimizer_of(self, module: TaskModule) -> LightningOptimizer:
        """The one optimizer: several are refused at setup."""
        return cast("LightningOptimizer", module.optimizers())

    def is_finite(self, module: TaskModule, signals: Signals | None) -> bool:
        """Whether the step may be taken; losses and gradients are judged with one look, the only transfer.

        Raises:
            RuntimeError: If too many steps were skipped in a row.
        """
        doubtful = torch.zeros((), device=module.device)
        if not module.automatic_optimization:
            doubtful = finite_if_all(self.optimizer_of(module).param_groups, doubtful)
        if signals is not None:
            # A sum is finite only if all of it is; the gradients' norm speaks for what was measured of them, too.
            doubtful = doubtful + signals.losses.sum()
            if module.automatic_optimization and signals.norms is not None:
                doubtful = doubtful + signals.norms.sum().to(doubtful)
        self.drops = not math.isfinite(float(doubtful))
        if not self.drops:
            self.skipped_in_a_row = 0
            return True
        self._skip(module, signals)
        return False

    def _skip(self, module: TaskModule, signals: Signals | None) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        culprits = "a gradient"
        if signals is not None:
            broken = torch.isfinite(signals.losses).logical_not().tolist()
            named = [repr(task) for task, is_broken in zip(signals.tasks, broken, strict=True) if is_broken]
            culprits = f"the loss of {', '.join(named)}" if named else culprits
        step = module.trainer.global_step
        if self.skipped == 1:
            rank_zero_warn(f"Step {step} is skipped: {culprits} is not finite. Later skips are counted, not reported.")
        if self.skipped_in_a_row > module.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last at step {step}: {culprits} is not "
                "finite. Lower the learning rate, mend the loss, or raise max_skipped_steps."
            )

    def step(self, module: TaskModule, rates: AbstractContextManager[None], *, scaler: object, finite: bool) -> None:
        """Clip, step the optimizer and the schedulers that count steps or epochs.

        Args:
            module: What is trained.
            rates: A block in which the tasks' own learning rates hold.
            scaler: The gradient scaler of half precision, if there is one.
            finite: Whether gradients and losses are.
        """
        optimizer = self.optimizer_of(module)
        if finite or scaler is not None:
            # A scaler has to see gradients that are not finite: it skips the step, and lowers its factor.
            with rates, _SILENT if module.gradient_clip_val is None else clipping(module, optimizer):
                optimizer.step()
        else:
            optimizer.zero_grad()
        trainer = module.trainer
        if trainer.lr_scheduler_configs:
            step_schedulers(module, module.schedules, "step", trainer.fit_loop.epoch_loop.batch_idx, plateau=False)
            if trainer.is_last_batch:
                step_schedulers(module, module.schedules, "epoch", trainer.current_epoch, plateau=False)


def finite_if_all(groups: Iterable[Mapping[str, Any]], zero: Tensor) -> Tensor:
    """A number that is finite only if all gradients are that an optimizer is about to use; ``zero`` without any."""
    gradients = values_of_gradients([parameter for group in groups for parameter in group["params"]])
    if not gradients:
        return zero
    kinds = {(type(gradient), gradient.dtype, gradient.device) for gradient in gradients}
    if len(kinds) == 1 and not isinstance(gradients[0], DTensor):
        # As torch computes the norm of all, without its sorting by kind: the gradients are read once, and no more.
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).sum()
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def synchronizing(module: TaskModule) -> AbstractContextManager[None]:
    """Keep the ranks' gradients from being averaged before a step's last backward pass."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return nullcontext()
    # A static graph is learned in the very first backward pass, which has to be a synchronized one, by Lightning's own
    # book-keeping. Averaging early, or twice, changes nothing: what is the same on all ranks is its own average.
    if getattr(strategy.model, "static_graph", False) and not strategy._pl_static_graph_delay_done:
        return nullcontext()
    return strategy.block_backward_sync()


@contextmanager
def clipping(module: TaskModule, optimizer: LightningOptimizer) -> Iterator[None]:
    """Clip inside ``optimizer.step``, after all hooks and after a scaler's factor is gone, as Lightning clips."""

    def clip(stepping: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401
        parameters = [p for group in stepping.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:  # a step without labels; torch refuses to clip nothing
            return
        if any(p.grad.is_sparse for p in parameters):
            _clip_sparse(parameters, module.gradient_clip_val or 0.0, module.gradient_clip_algorithm)
            return
        module.trainer.precision_plugin.clip_gradients(
            stepping, module.gradient_clip_val or 0.0, GradClipAlgorithmType(module.gradient_clip_algorithm)
        )

    handle = optimizer.optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        handle.remove()


def _clip_sparse(parameters: Sequence[Tensor], limit: float, algorithm: str) -> None:
    """Clip as torch does, which knows no norm of sparse gradients."""
    values = values_of_gradients(parameters)
    if algorithm == GradClipAlgorithmType.VALUE:
        for value in values:
            value.clamp_(-limit, limit)
        return
    factor = (limit / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor)


def values_of_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The numbers that the parameters' gradients hold, in their own memory; of sparse gradients each row once."""
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that comes twice counts by its sum
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    return values
