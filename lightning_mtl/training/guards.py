"""Synchronization, clipping and the refusals of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.gradients.inner_products import values_of_gradients
from lightning_mtl.gradients.micro_batch import MicroBatch, stack_losses
from lightning_mtl.gradients.torch_internals import times_written
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals
from lightning_mtl.training.losses import agree
from lightning_mtl.training.snapshots import Snapshot
from lightning_mtl.training.window import Window

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
    gradients: list[Tensor] = []
    if not module.automatic_optimization:
        groups = module.single_optimizer().param_groups
        gradients = values_of_gradients(parameter for group in groups for parameter in group["params"])
    if not gradients:
        return torch.zeros((), device=module.device)
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def synchronizing(module: MultiTaskModule, *, closes: bool) -> AbstractContextManager[None]:
    """Let the ranks' gradients be averaged in a step's last backward pass only."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, DDPStrategy) or closes:
        return nullcontext()
    # A static graph is learned in the very first backward pass, which has to be a synchronized one, by Lightning's own
    # book-keeping. Averaging early, or twice, changes nothing: what is the same on all ranks is its own average.
    if getattr(strategy.model, "static_graph", False) and not strategy._pl_static_graph_delay_done:
        return nullcontext()
    return strategy.block_backward_sync()


@contextmanager
def writing_no_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Refuse a graph in which something writes into gradients while they are measured.

    Raises:
        ValueError: If a parameter's gradient is another one after the block.
    """
    before = [(p, p.grad, None if p.grad is None else times_written(p.grad)) for p in parameters if p.requires_grad]
    yield
    for parameter, gradient, version in before:
        if parameter.grad is not gradient or (gradient is not None and times_written(gradient) != version):
            raise ValueError(
                f"A parameter of shape {list(parameter.shape)} got a gradient while the tasks' gradients were measured "
                "one after another: an autograd.Function in the model calls backward() in its own backward(), as "
                "reversible layers do. Have it return its gradients, from torch.autograd.grad, or use a method that "
                "weighs by the losses alone."
            )


def forget_unreached(module: MultiTaskModule, window: Window) -> None:
    """Leave parameters that no rank's loss depended on without gradients, so that no optimizer moves them."""
    if window.ranks.size == 1:
        return
    if window.gradients is not None and window.gradients.reached is not None:
        reached = window.gradients.reached
        unreached = [p for p in module.parameters() if p not in reached]
    elif len(window.present) == len(module.tasks):
        return
    elif module.sharded:
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
        parameters = [p for group in stepping.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
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


def check_split(module: MultiTaskModule, batch: MicroBatch, window: Window) -> None:
    """Refuse a step whose trunk showed no output to measure gradients at.

    Named modules need none: their gradients are those of the losses.
    """
    at = window.measures_at
    if set(batch.names) <= set(batch.absent) or at not in ("features", "last_layer"):
        return
    called = f"{type(window.weighting).__name__}(at={at!r})"
    if isinstance(module.trunk, torch.jit.ScriptModule):
        raise ValueError(
            f"{called} has to see what the trunk returns, and a script takes no hook and shows no layers. Measure at "
            "'trunk', or put the script into a module of your own."
        )
    if at == "last_layer":
        return
    if not batch.split.calls:
        raise ValueError(
            f"{called} measures gradients at the trunk's output, but the trunk was not called in this step; call "
            "self(inputs) or self.trunk(inputs) in task_losses, not one of the trunk's parts or its forward(). At "
            "'trunk' gradients of the shared parameters are measured, whatever is called."
        )
    if not batch.split.outputs:
        raise ValueError(
            f"{called} measures gradients at the trunk's output, but nothing the trunk returned requires a gradient; "
            "unfreeze some of it, or weigh by the losses alone. An object of a class of the trunk's own cannot be "
            "looked into: return tensors, or mappings, sequences or dataclasses of them, or measure at 'trunk'."
        )


def no_shared_parameters(window: Window) -> ValueError:
    """The refusal of a step in which there is nothing to balance."""
    return ValueError(
        f"{type(window.weighting).__name__}(at='trunk') measures gradients of the shared parameters, but none of "
        "them can be trained; unfreeze some, override shared_parameters(), or weigh by the losses alone."
    )


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
