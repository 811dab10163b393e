"""What surrounds an optimizer step: synchronisation, clipping, and the refusal of what cannot be right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mtl.agreement import agree, stack_losses
from lightning_mtl.callbacks import Weighting
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.signals import Signals
from lightning_mtl.snapshots import Snapshot
from lightning_mtl.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class SkippedSteps:
    """Counts the steps that were skipped because a loss or a gradient was not finite."""

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0

    def check(self, module: MultiTaskModule, signals: Signals | None) -> bool:
        """Whether the step may be taken; losses and gradients are judged with one look, the only transfer.

        Raises:
            RuntimeError: If too many steps were skipped in a row.
        """
        doubtful = _gradient_norm(module)
        if signals is not None:
            # A sum is finite only if all of it is; the gradients' norm speaks for what was measured of them, too.
            doubtful = doubtful + signals.losses.sum()
            if module.automatic_optimization and signals.norms is not None:
                doubtful = doubtful + signals.norms.sum().to(doubtful)
        if math.isfinite(float(doubtful)):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        culprits = "a gradient"
        if signals is not None:
            broken = torch.isfinite(signals.losses).logical_not().tolist()
            named = [repr(task) for task, is_broken in zip(signals.tasks, broken, strict=True) if is_broken]
            culprits = f"the loss of {', '.join(named)}" if named else culprits
        step = module.trainer.global_step
        if self.total == 1:
            rank_zero_warn(f"Step {step} is skipped: {culprits} is not finite. Later skips are counted, not reported.")
        if self.in_a_row > module.max_skipped_steps:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row were skipped, the last at step {step}: {culprits} is not finite. "
                "Lower the learning rate, mend the loss, or raise max_skipped_steps."
            )
        return False


def _gradient_norm(module: MultiTaskModule) -> Tensor:
    """The norm of all gradients that the optimizer is about to use; 0 where Lightning takes the step."""
    gradients = []
    if not module.automatic_optimization:
        groups = module.single_optimizer().param_groups
        gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=module.device)
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def synchronising(module: MultiTaskModule, window: Window, *, closes: bool) -> AbstractContextManager[None]:
    """Let the ranks' gradients be averaged in a window's last backward pass; rows have been by then."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, DDPStrategy) or (window.rows is None and closes):
        return nullcontext()
    # A static graph is learned in the very first backward pass, which has to be a synchronised one, by Lightning's own
    # book-keeping. Averaging early, or twice, changes nothing: what is the same on all ranks is its own average.
    if getattr(strategy.model, "static_graph", False) and not strategy._pl_static_graph_delay_done:
        return nullcontext()
    return strategy.block_backward_sync()


def forget_unreached(module: MultiTaskModule, window: Window) -> None:
    """Leave parameters that no rank's loss depended on without gradients, so that no optimizer moves them."""
    if window.ranks.size == 1 or len(window.present) == len(module.tasks):
        return
    if window.rows is not None and not module.sharded:  # rows know what they reached
        return
    if module.sharded:
        kept = {p for task in window.present for p in module.heads[task].parameters()}
        parts = [module.heads[task] for task in module.tasks if task not in window.present]
        parts += [] if window.present or window.penalties else [module.trunk]
        unreached = [p for part in parts for p in part.parameters() if p not in kept]
    else:
        parameters = list(module.parameters())
        flags = torch.tensor([float(p in window.reached) for p in parameters], device=module.device)
        flags = window.ranks.sum(flags)
        unreached = [p for p, flag in zip(parameters, flags.tolist(), strict=True) if not flag]
    for parameter in unreached:
        parameter.grad = None


@contextmanager
def clipping(module: MultiTaskModule, optimizer: LightningOptimizer) -> Iterator[None]:
    """Clip inside ``optimizer.step``, after all hooks and after a scaler's factor is gone, as Lightning clips."""
    if module.gradient_clip_val is None:
        yield
        return

    def clip(stepping: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401
        module.trainer.precision_plugin.clip_gradients(
            stepping, module.gradient_clip_val or 0.0, GradClipAlgorithmType(module.gradient_clip_algorithm)
        )

    handle = optimizer.optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        handle.remove()


def check_cut(batch: MicroBatch, window: Window) -> None:
    """Refuse a step whose trunk left no trace to measure gradients at."""
    cut = batch.cut
    if len(batch.absent) == len(batch.names):
        return
    called = f"{type(window.weighting).__name__}(at={getattr(window.weighting, 'at', None)!r}) measures gradients"
    if window.shares is not None and window.way == "features":
        called = "A callback that shares_trunk weighs gradients"
    if not cut.calls:
        raise ValueError(
            f"{called} at the trunk, but the trunk was not called in this step; call "
            "self(inputs) or self.trunk(inputs) in task_losses, not one of the trunk's parts."
        )
    if not cut.outputs:
        raise ValueError(
            f"{called} at the trunk, but nothing the trunk returned requires a gradient; "
            "unfreeze some of it, or weigh by the losses alone."
        )


def trainable_shared_parameters(module: MultiTaskModule) -> list[nn.Parameter]:
    """The shared parameters as far as they train in this step; what has thawed since the last one is among them."""
    shared = [parameter for parameter in module.shared_parameters() if parameter.requires_grad]
    if not shared:
        raise ValueError(
            f"{type(module.weighting()).__name__}(at='trunk') measures gradients of the shared parameters, but none of "
            "them can be trained; unfreeze some, override shared_parameters(), or weigh by the losses alone."
        )
    return shared


def waits_for_thaw(module: MultiTaskModule) -> bool:
    """Whether no shared parameter trains yet, and a callback is there to unfreeze some."""
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, BaseFinetuning) for callback in callbacks) and not any(
        parameter.requires_grad for parameter in module.shared_parameters()
    )


def for_heads_alone(weighting: Weighting | None) -> Weighting | None:
    """The weighting, where it can weigh heads over a frozen trunk; else None, for there is nothing to balance."""
    able = weighting is not None and weighting.measures == "losses" and weighting.weighs_heads
    return weighting if able else None


@torch.no_grad()
def losses_after(module: MultiTaskModule, window: Window, names: Sequence[str]) -> Tensor:
    """Compute the window's mean losses again, under the parameters as they are now, and leave no trace of it.

    Buffers and random numbers are put back, and no metric is updated.
    """
    again = Window(tuple(module.tasks), None, window.step, window.epoch, window.size, window.ranks)
    before = Snapshot(module, module.device)
    try:
        for batch in window.batches:
            outputs = module.present_outputs(batch)
            with torch.autocast(module.device.type, enabled=False):
                losses = stack_losses([output.loss for output in outputs.values()], module.device)
                again.note(agree(outputs, losses, tuple(module.tasks), window.ranks), {})
    finally:
        before.put_back()
    return again.mean_losses(names)
