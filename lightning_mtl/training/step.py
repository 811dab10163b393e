"""The training step: losses in, one optimizer step out, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.inner_products import values_of_gradients
from lightning_mtl.gradients.micro_batch import stack_losses
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.gradients.split import Split
from lightning_mtl.gradients.torch_internals import keeping_buffers
from lightning_mtl.monitors.throughput import Phases
from lightning_mtl.training.guards import (
    SkippedSteps,
    clipping,
    for_heads_alone,
    forget_unreached,
    losses_after,
    synchronizing,
    waits_for_thaw,
    writing_no_gradients,
)
from lightning_mtl.training.logging import sample_counts
from lightning_mtl.training.losses import agree
from lightning_mtl.training.objectives import loss_of, micro_batch_of, open_collection
from lightning_mtl.training.observation import Observation
from lightning_mtl.training.schedulers import step_schedulers
from lightning_mtl.training.task_rates import Steering
from lightning_mtl.training.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

ALONE = Ranks.alone()


class Optimization:
    """Runs the training step of a :class:`~lightning_mtl.MultiTaskModule`."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self._closed: Window | None = None
        self._drops = False
        self._writes_none = False  # whether measuring was seen to leave the parameters' gradients alone
        self.skipped = SkippedSteps()
        self.matrix: Rows | None = None
        self.steering = Steering()
        self._observation: Observation  # of the open window
        self.phases = Phases()

    def __reduce__(self) -> tuple[type[Optimization], tuple[()]]:
        # A module that is copied, for weight averaging for instance, or pickled has no step under way, and needs no
        # second matrix of rows.
        return Optimization, ()

    def begin(self, module: MultiTaskModule) -> None:
        """Begin a fit: nothing of a step that another one left unfinished goes on."""
        self.window = self._closed = None
        self._writes_none = False
        self.steering.begin(module)

    def run(self, module: MultiTaskModule, batch: Any, batch_idx: int) -> Tensor | None:  # noqa: ANN401
        """Take one micro-batch; step the optimizer if it closes the window.

        Returns:
            The weighted loss: detached, or with its graph where Lightning runs the backward pass.
        """
        size = module.micro_batches_a_step
        if batch_idx % size == 0 or self.window is None:
            self.window = self._open(module, size)
            self._observation = Observation(module, self.window)
        window = self.window
        closes = (batch_idx + 1) % size == 0 or module.trainer.is_last_batch
        with keeping_buffers() if window.passes_again or self._observation.passes_again else nullcontext():
            objective = self._differentiate(module, window, batch, closes=closes)
        if closes:
            self.window = None
            self._close(module, window)
        module.recorder.log_step(module)
        return objective

    def _differentiate(
        self,
        module: MultiTaskModule,
        window: Window,
        batch: Any,  # noqa: ANN401
        *,
        closes: bool,
    ) -> Tensor | None:
        """Pass one micro-batch forward and, unless Lightning does it or rows are still collected, backward."""
        split = Split()
        watching = split.watching(module.heads) if module.sharded else nullcontext()
        self._observation.before_forward(module)
        with self.phases("forward"), watching:
            with split.applied_to(module.trunk) if self._needs_split(window) else nullcontext():
                outputs = module.present_outputs(batch)
            penalties = module.penalties()
        if window.weighting is not None and window.weighting.wants_losses_after:
            window.batches.append(batch)
        step_metric = None if window.weighting is None else window.weighting.step_metric
        scores = module.update_metrics("train", outputs, step_metric)
        self.steering.collect(module, window, batch, outputs)
        # Gradients are taken as automatic optimization takes them: outside autocast.
        with torch.autocast(module.device.type, enabled=False):
            losses = stack_losses([output.loss.detach() for output in outputs.values()], module.device)
            agreed = agree(outputs, losses, tuple(module.tasks), window.ranks, scores)
            window.note(agreed, penalties, None if module.learned_tasks is None else len(module.learned_tasks))
            if outputs:
                window.local.append((list(outputs), losses, sample_counts(list(outputs.values()))))
            micro_batch = micro_batch_of(module, window, agreed, outputs, penalties, split)
            if window.micro_batches == 1:
                with self.phases("monitors"):
                    self._observation.measure(module, agreed, micro_batch, batch)
            # One look a fit: a graph that writes gradients while it is measured does so in every step.
            looking = nullcontext() if self._writes_none else writing_no_gradients(module.parameters())
            with self.phases("measuring"), looking:
                loss = loss_of(module, window, agreed, micro_batch, closes=closes)
            self._writes_none = self._writes_none or bool(agreed.names)
            if loss is None and module.automatic_optimization and window.collects:
                # Lightning passes something backward in every micro-batch; what this one's gradients are is kept.
                return torch.zeros((), device=module.device, requires_grad=True)
            if loss is not None and not module.automatic_optimization:
                with self.phases("backward"), synchronizing(module, closes=closes):
                    module.manual_backward(loss)
                loss = loss.detach()
        return loss

    def _needs_split(self, window: Window) -> bool:
        """Whether the trunk's outputs have to be known: to measure there, or to stand in for absent tasks."""
        stands_in = window.ranks.size > 1 and (window.way == "rows" or window.size > 1)
        at_features = window.wanted != "nothing" and window.measures_at != "trunk"
        return window.way == "features" or at_features or stands_in or self._observation.measures

    def after_automatic_backward(self, module: MultiTaskModule) -> None:
        """What follows a window's backward pass where Lightning runs it."""
        if module.automatic_optimization and self._closed is not None:
            forget_unreached(module, self._closed)
            self._closed.gradients = None
            self._closed = None

    def before_automatic_step(self, module: MultiTaskModule, optimizer: torch.optim.Optimizer) -> None:
        """Take gradients that are not finite away from an optimizer that Lightning steps whatever they are."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = values_of_gradients(parameters)
        if self._drops or (gradients and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))):
            for parameter in parameters:
                parameter.grad = None
        else:
            self.steering.before_step(module, optimizer)
        self.steering.groups.apply(optimizer)

    def _open(self, module: MultiTaskModule, size: int) -> Window:
        trainer, weighting = module.trainer, module.weighting()
        ranks = Ranks(module.data_parallel_group, self.phases) if trainer.world_size > 1 else ALONE
        step, epoch = trainer.global_step, trainer.current_epoch
        shares = self.steering.shares(module, step)
        if waits_for_thaw(module):
            weighting, shares = for_heads_alone(weighting), None
        window = Window(tuple(module.tasks), weighting, step, epoch, size, ranks, shares)
        window.phases = self.phases
        if not module.automatic_optimization:
            module.single_optimizer().zero_grad()
        if window.way == "rows":
            # Before the forward pass: after it, a sharded module lists other tensors, which get no gradients.
            window.gradients = open_collection(module, window)
        return window

    def _close(self, module: MultiTaskModule, window: Window) -> None:
        """Step the optimizer, unless something is not finite, and tell weighting, monitors and loggers."""
        if module.automatic_optimization:
            self._closed = window
        else:
            forget_unreached(module, window)
            window.gradients = None  # K gradients of each head need not outlive the step
        signals = window.summary()
        finite = self.skipped.check(module, signals)
        self._drops = not finite
        self.steering.choose(module, window)
        if not module.automatic_optimization:
            self._step(module, finite=finite)
        if not finite or signals is None:
            return
        self.steering.observe(module, window, signals)
        for names, losses, samples in window.local:
            module.recorder.losses["train"].add(losses, samples, window.positions(names))
        if window.weighting is not None:
            if window.weighting.wants_losses_after and window.batches:
                signals = replace(signals, losses_after=losses_after(module, window, signals.tasks))
            window.weighting.observe(signals, window.positions(signals.tasks))
        with self.phases("monitors"):
            self._observation.hand_over(module, signals)
        vectors: dict[str, tuple[Sequence[str], Tensor]] = {"loss": (signals.tasks, signals.losses)}
        if signals.norms is not None:
            vectors["grad_norm"] = (signals.tasks, signals.norms)
        if (weights := window.applied_weights) is not None:
            vectors["weight"] = (signals.tasks, weights[window.positions(signals.tasks)])
        if self.steering.effective is not None:
            vectors["lr"] = self.steering.effective
        module.recorder.record_step(vectors, {f"penalty/{name}": value for name, value in window.penalties.items()})

    def _step(self, module: MultiTaskModule, *, finite: bool) -> None:
        optimizer = module.single_optimizer()
        if finite or getattr(module.trainer.precision_plugin, "scaler", None) is not None:
            # A scaler has to see gradients that are not finite: it skips the step, and lowers its factor.
            with (
                self.phases("optimizer"),
                self.steering.around_step(module, finite=finite),
                clipping(module, optimizer),
            ):
                optimizer.step()
        else:
            optimizer.zero_grad()
        trainer = module.trainer
        step_schedulers(module, module.schedules, "step", trainer.fit_loop.epoch_loop.batch_idx, plateau=False)
        if trainer.is_last_batch:
            step_schedulers(module, module.schedules, "epoch", trainer.current_epoch, plateau=False)
        module.recorder.plateau_due("step", trainer.fit_loop.epoch_loop.batch_idx)
