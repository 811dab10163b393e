"""The training step: losses in, one optimizer step out, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mtl.agreement import Agreement, agree, ghost_of_outputs, ghost_of_parameters, stack_losses
from lightning_mtl.callbacks import Monitor
from lightning_mtl.gradients.compiled import keeping_buffers
from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.feature_update import feature_objective
from lightning_mtl.gradients.micro_batch import Decision, Measured, MicroBatch
from lightning_mtl.gradients.ranks import Ranks
from lightning_mtl.gradients.row_update import RowUpdate
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.gradients.sharded_update import ShardedRowUpdate, sharded_feature_objective
from lightning_mtl.recorder import sample_counts
from lightning_mtl.schedules import step_schedulers
from lightning_mtl.steering import Steering
from lightning_mtl.step_guards import (
    SkippedSteps,
    check_cut,
    clipping,
    for_heads_alone,
    forget_unreached,
    losses_after,
    synchronising,
    trainable_shared_parameters,
    waits_for_thaw,
)
from lightning_mtl.task import TaskOutput
from lightning_mtl.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

ALONE = Ranks.alone()


class Optimization:
    """Runs the training step of a :class:`~lightning_mtl.MultiTaskModule`."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self._closed: Window | None = None
        self._drops = False
        self.skipped = SkippedSteps()
        self._matrix: Rows | None = None
        self.steering = Steering()

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimization:
        # A copied module, of weight averaging for instance, has no step under way and needs no second matrix of rows.
        return Optimization()

    def run(self, module: MultiTaskModule, batch: Any, batch_idx: int) -> Tensor | None:  # noqa: ANN401
        """Take one micro-batch; step the optimizer if it closes the window.

        Returns:
            The weighted loss: detached, or with its graph where Lightning runs the backward pass.
        """
        size = module.micro_batches_a_step
        if batch_idx % size == 0 or self.window is None:
            self.window = self._open(module, size)
        window = self.window
        closes = (batch_idx + 1) % size == 0 or module.trainer.is_last_batch
        with keeping_buffers() if window.passes_again else nullcontext():
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
        cut = FeatureCut()
        watching = cut.watching(module.heads) if module.sharded else nullcontext()
        with watching, nullcontext() if window.way == "losses" else module.cutting(cut):
            outputs = module.present_outputs(batch)
            penalties = module.penalties()
        if window.weighting is not None and window.weighting.wants_losses_after:
            window.batches.append(batch)
        step_metric = None if window.weighting is None else window.weighting.step_metric
        scores = module.update_metrics("train", outputs, step_metric)
        self.steering.collect(module, window, batch, outputs)
        # Gradients are taken as automatic optimization takes them: outside autocast.
        with torch.autocast(module.device.type, enabled=False):
            losses = stack_losses([output.loss for output in outputs.values()], module.device)
            agreed = agree(outputs, losses.detach(), tuple(module.tasks), window.ranks, scores)
            window.note(agreed, penalties)
            if outputs:
                window.local.append((list(outputs), losses.detach(), sample_counts(list(outputs.values()))))
            micro_batch = self._micro_batch(module, window, agreed, outputs, penalties, cut)
            objective = self._objective(module, window, agreed, losses, micro_batch, closes=closes)
            if objective is not None and not module.automatic_optimization:
                with synchronising(module, window, closes=closes):
                    module.manual_backward(objective)
                objective = objective.detach()
        return objective

    def after_automatic_backward(self, module: MultiTaskModule) -> None:
        """What follows a window's backward pass where Lightning runs it."""
        if module.automatic_optimization and self._closed is not None:
            forget_unreached(module, self._closed)
            self._closed = None

    def before_automatic_step(self, module: MultiTaskModule, optimizer: torch.optim.Optimizer) -> None:
        """Take gradients that are not finite away from an optimizer that Lightning steps whatever they are."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        if self._drops or (gradients and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))):
            for parameter in parameters:
                parameter.grad = None
        else:
            self.steering.before_step(module, optimizer)
        self.steering.groups.apply(optimizer)

    def _open(self, module: MultiTaskModule, size: int) -> Window:
        trainer, weighting = module.trainer, module.weighting()
        ranks = Ranks(module.data_parallel_group) if trainer.world_size > 1 else ALONE
        step, epoch = trainer.global_step, trainer.current_epoch
        shares = self.steering.shares(module, step)
        if waits_for_thaw(module):
            weighting, shares = for_heads_alone(weighting), None
        window = Window(tuple(module.tasks), weighting, step, epoch, size, ranks, shares)
        if not module.automatic_optimization:
            module.single_optimizer().zero_grad()
        if window.way == "rows":
            shared = trainable_shared_parameters(module)
            others = []
            if ranks.size > 1:
                others = [p for p in module.parameters() if p.requires_grad and p not in set(shared)]
            if module.sharded:
                window.rows = ShardedRowUpdate(shared, others, tuple(module.tasks))
            else:
                window.rows = RowUpdate(shared, others, tuple(module.tasks), self._matrix)
                self._matrix = window.rows.rows
        return window

    def _objective(
        self,
        module: MultiTaskModule,
        window: Window,
        agreed: Agreement,
        losses: Tensor,
        batch: MicroBatch,
        *,
        closes: bool,
    ) -> Tensor | None:
        """The scalar whose backward pass is this micro-batch's part of the step; none while rows are collected."""
        if window.rows is not None:
            return self._row_objective(module, window, batch, closes=closes)
        if not batch.names:
            objective = batch.penalty
        elif window.way == "losses":
            weights = window.decide(batch.names, agreed.losses, Measured()).weights
            weights = weights if batch.seeds is None else weights * batch.seeds
            here = losses if len(losses) == len(weights) else stack_losses(batch.losses, module.device)
            objective = (here * weights).sum()
            objective = objective if batch.penalty is None else objective + batch.penalty
        else:
            objective = self._feature_objective(module, window, batch, agreed.losses)
        divides = objective is not None and window.size > 1 and not module.automatic_optimization
        return objective / window.size if objective is not None and divides else objective

    def _micro_batch(
        self,
        module: MultiTaskModule,
        window: Window,
        agreed: Agreement,
        outputs: dict[str, TaskOutput],
        penalties: dict[str, Tensor],
        cut: FeatureCut,
    ) -> MicroBatch:
        ranks = window.ranks
        penalty = torch.stack(list(penalties.values())).sum() if penalties else None
        absent = [task for task in module.tasks if task not in outputs]
        zero = agreed.losses.new_zeros(())
        losses = {task: output.loss for task, output in outputs.items()}
        if ranks.size > 1 and window.rows is None and len(agreed.names) < len(module.tasks):
            window.note_reached([*losses.values(), *penalties.values()], cut)
        # The ranks' collectives expect every parameter in the graph, on every rank and in every step.
        if module.sharded:
            losses.update((task, ghost_of_outputs(cut.head_outputs.get(task, ()), zero)) for task in absent)
            ghosts = [losses[task] for task in absent if task not in agreed.names]
        else:
            ghosts = [ghost_of_parameters(module, zero)] if ranks.size > 1 and absent and window.rows is None else []
        if ghosts:
            penalty = torch.stack([*ghosts, *([] if penalty is None else [penalty])]).sum()
        seeds = agreed.own_counts if window.rows is not None and window.size > 1 else agreed.shares()
        if ranks.size == 1 and window.size == 1:
            seeds = None
        elif seeds is not None and (window.rows is None or module.sharded):
            seeds = seeds * ranks.size  # what the average over the ranks divides by
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None or window.way == "losses" else scaler.scale(torch.ones((), device=module.device))
        every_loss = [losses.get(task, zero) for task in agreed.names]
        return MicroBatch(agreed.names, every_loss, penalty, cut, absent, seeds, scale, ranks)

    def _feature_objective(self, module: MultiTaskModule, window: Window, batch: MicroBatch, losses: Tensor) -> Tensor:
        check_cut(module, batch, window)
        wanted = window.wanted if window.asks(batch.names) else "nothing"

        def decide(measured: Measured) -> Decision:
            return window.decide(batch.names, losses, measured)

        if module.sharded:
            return sharded_feature_objective(batch, losses, decide, wanted=wanted, weighs_heads=window.weighs_heads)
        return feature_objective(
            batch,
            losses,
            decide,
            wanted=wanted,
            layer=None if wanted == "nothing" else window.layer(module, batch.cut),
            weighs_heads=window.weighs_heads,
            shared=module.shared_parameters,
        )

    def _row_objective(
        self, module: MultiTaskModule, window: Window, batch: MicroBatch, *, closes: bool
    ) -> Tensor | None:
        """Collect the micro-batch's rows; at the window's end, the scalar that writes what they combine to."""
        rows = window.rows
        assert rows is not None  # noqa: S101 - for mypy: asked for by this way alone
        if batch.names:
            check_cut(module, batch, window)
        if batch.names or batch.penalty is not None or closes:
            rows.add(batch, 1.0 / (window.size * window.ranks.size), last=closes)
        if not closes:
            return None
        names = rows.present
        if not names:
            return None if batch.penalty is None else batch.penalty / window.size
        if window.size > 1:
            counts = window.sums()[1]
            for name, count in zip(names, counts[window.positions(names)].tolist(), strict=True):
                rows.scale(name, window.micro_batches / window.size / count)
        losses = window.mean_losses(names)
        return rows.objective(
            batch,
            losses,
            lambda measured: window.decide(names, losses, measured),
            wanted=window.wanted,
            weighs_heads=window.weighs_heads,
        )

    def _close(self, module: MultiTaskModule, window: Window) -> None:
        """Step the optimizer, unless something is not finite, and tell weighting, monitors and loggers."""
        if module.automatic_optimization:
            self._closed = window
        else:
            forget_unreached(module, window)
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
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Monitor):
                callback.observe(module.trainer, module, signals, window.applied_weights)
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
            with self.steering.around_step(module, finite=finite), clipping(module, optimizer):
                optimizer.step()
        else:
            optimizer.zero_grad()
        trainer = module.trainer
        step_schedulers(module, module.schedules, "step", trainer.fit_loop.epoch_loop.batch_idx, plateau=False)
        if trainer.is_last_batch:
            step_schedulers(module, module.schedules, "epoch", trainer.current_epoch, plateau=False)
        module.recorder.plateau_due("step", trainer.fit_loop.epoch_loop.batch_idx)
