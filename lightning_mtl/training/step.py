"""A training step goes from a batch to the optimizer here, in the order of the package's pseudocode."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.gradients.feature_measurement import groups_read
from lightning_mtl.gradients.features import FeatureGradients
from lightning_mtl.gradients.gathered import GatheredGramian
from lightning_mtl.gradients.graph import writing_no_gradients
from lightning_mtl.gradients.inner_products import Measured
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.gradients.sharded import ShardedTrunkGradients
from lightning_mtl.gradients.split import Split
from lightning_mtl.gradients.torch_internals import KEEPING_BUFFERS
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.gradients.trunk_gramian import TrunkGramian
from lightning_mtl.monitors.throughput import Phases
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.absent import forget_absent
from lightning_mtl.training.beside import renewed_rows, traces_of
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.checks import check_collection, nothing_trains
from lightning_mtl.training.closure import forward_alone, pass_again
from lightning_mtl.training.features import features_of, find_layer
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.losses import micro_batch_of, reduce_losses, sample_counts, to_weigh
from lightning_mtl.training.observation import Observation
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.scores import update_metrics
from lightning_mtl.training.sharing import find_shared
from lightning_mtl.training.snapshots import losses_after
from lightning_mtl.training.synchronization import learns_graph, synchronizing
from lightning_mtl.training.update import Update
from lightning_mtl.training.window import Collection, Window

_SILENT: AbstractContextManager[None] = nullcontext()
_NOWHERE = Split()  # the trunk's outputs where nobody asks for them


def trainable_parameters(module: TaskModule) -> tuple[list[Tensor], list[Tensor]]:
    """The shared parameters that need gradients now, and all other parameters that do."""
    shared: list[Tensor] = [p for p in module.shared_parameters() if p.requires_grad]
    known = set(shared)
    return shared, [p for p in module.parameters() if p.requires_grad and p not in known]


class Optimization:
    """Runs the training step of a :class:`~lightning_mtl.BalancedModule`; tells a recorder of each, to log it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.update, self.phases = recorder, Update(), Phases()
        self.window: Window | None = None
        self.cast: Cast  # of the present fit
        self._callbacks: list[Any] | None = None  # the Trainer's, when the cast was found
        self._observation: Observation | None = None  # of the open window
        self._rows: list[Rows] = []  # at most one, its matrix used from step to step
        self._closed: tuple[int, Window] | None = None  # the newest step, which Lightning may ask for again
        self.ran = self._looked = False  # whether this fit took a batch, and looked for what cannot be measured

    def __reduce__(self) -> tuple[type[Optimization], tuple[Recorder]]:
        # A module that is copied (by weight averaging) or pickled has no step under way, and needs no second matrix.
        return Optimization, (self.recorder,)

    def begin(self, module: TaskModule) -> None:
        """Begin a fit: nothing of a step that another one left unfinished goes on."""
        self.window = self._callbacks = self._closed = None
        self._looked = self.ran = False
        self.find_cast(module)
        self.update.begin()

    def run(self, module: TaskModule, batch: object, batch_idx: int) -> Tensor | None:
        """Take one micro-batch; step the optimizer if it closes the window.

        Returns:
            The weighted loss: detached, or with its graph where Lightning runs the backward pass.
        """
        self.ran = True
        if module.trainer.fit_loop._skip_backward:
            return forward_alone(module, batch)
        self.find_cast(module)
        if self._closed is not None and self._closed[0] == module.trainer.fit_loop.epoch_loop.total_batch_idx:
            return pass_again(self, module, self._closed[1], batch_idx)  # Lightning's closure asks for the same step
        self._closed = None
        if self.window is None or batch_idx % self.window.size == 0:
            self.window = self._open(module, batch_idx)
        window = self.window
        last = (batch_idx + 1) % window.size == 0 or module.trainer.is_last_batch
        beside = self._observation
        with KEEPING_BUFFERS if window.passes_again or (beside and beside.passes_again) else _SILENT:
            loss = self.pass_batch(module, window, batch, last=last)
        if last:
            self.window = None
            self._close(module, window, batch_idx)
        if self.recorder.unlogged and module.trainer._logger_connector.should_update_logs:
            self.recorder.log_step(module)
        return loss

    def pass_batch(self, module: TaskModule, window: Window, batch: object, *, last: bool) -> Tensor | None:
        """Pass one micro-batch forward and, unless Lightning does it or gradients are still collected, backward."""
        micro_batch, reduced = self._forward(module, window, batch)
        kind = module.device.type
        # Gradients are taken as automatic optimization takes them: outside autocast.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _SILENT:
            # Once a fit: a graph that writes gradients while it is measured does so in every step.
            looks = not self._looked and (window.collects or window.way == "features" or window.at_shared)
            self._looked |= looks
            with self.phases.during("measuring"), writing_no_gradients(module.parameters()) if looks else _SILENT:
                loss = self._loss(module, window, reduced, micro_batch, last)
            if loss is None and window.collects and not learns_graph(module):
                # Something is passed backward in every micro-batch, for the hooks; what its gradients are is kept.
                loss = torch.zeros((), device=module.device, requires_grad=True)
            if loss is not None and not loss.requires_grad:
                raise nothing_trains(list(module.tasks))
            if module.automatic_optimization or loss is None:
                return window.with_earlier(loss) if loss is not None and self.cast.asks_again else loss
            with self.phases.during("backward"), _SILENT if last else synchronizing(module):
                module.manual_backward(loss)
        window.loss = loss.detach() if window.loss is None else window.loss + loss.detach()
        return loss.detach()

    def find_cast(self, module: TaskModule) -> Cast:
        """Look for who takes part: once a fit, and again where a tuner or a user has changed the callbacks."""
        callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
        if self._callbacks != callbacks:
            self.cast, self._callbacks = Cast.of(module, self.phases), list(callbacks)
        return self.cast

    def _open(self, module: TaskModule, batch_idx: int) -> Window:
        trainer, cast, weighting = module.trainer, self.cast, self.cast.weighting
        if cast.whole is not None:
            cast.whole.gather(module)
        step, epoch = trainer.global_step, trainer.current_epoch
        size = trainer.accumulate_grad_batches if module.automatic_optimization else module.accumulate_grad_batches
        shares = None if cast.steering is None else cast.steering.shares(module, step)
        if cast.thaws and module.sharing is None and not any(p.requires_grad for p in module.shared_parameters()):
            # Until a callback unfreezes some of what is shared there is nothing to balance but the heads.
            able = weighting is not None and weighting.measures == "losses" and weighting.weighs_heads
            weighting, shares = weighting if able else None, None
        scales, resting = self.recorder.scales, cast.stopping.resting if cast.stopping else None
        window = Window(tuple(module.tasks), weighting, step, epoch, size, cast.ranks, shares, scales, resting)
        # Hooks of this older kind may change a layer's weight gradient, which no short form computes.
        window.keeps_rows = window.keeps_rows or any(m._is_full_backward_hook is False for m in module.modules())
        if not module.automatic_optimization:
            self.zero_gradients(module, batch_idx)
        if window.way == "rows" and cast.sharded:
            # Before the forward pass: after it, a sharded module lists other tensors, which get no gradients.
            window.gradients = self._collection(module, window)
        window.keeps_batches = cast.asks_again or (weighting is not None and weighting.wants_losses_after)
        self._observation = Observation(module, window, cast.monitors, cast.scaler) if cast.monitors else None
        return window

    def zero_gradients(self, module: TaskModule, batch_idx: int) -> None:
        """Begin a step without gradients, by the hooks that automatic optimization calls."""
        optimizer = module.optimizers().optimizer  # type: ignore[union-attr]  # several are refused at setup
        for callback in self._callbacks or ():
            callback.on_before_zero_grad(module.trainer, module, optimizer)
        module.on_before_zero_grad(optimizer)
        module.optimizer_zero_grad(module.trainer.current_epoch, batch_idx, optimizer)

    def _collection(self, module: TaskModule, window: Window) -> Collection:
        """Make ready to keep the step's gradients, task by task, where its weights are not known before its end."""
        (shared, others), tasks, ranks = trainable_parameters(module), tuple(module.tasks), window.ranks
        if self.cast.sharded or window.size > 1 or not shared:
            check_collection(window, shared, sharded=self.cast.sharded)
        if self.cast.sharded:
            return ShardedTrunkGradients(tasks, shared, others)
        if not window.keeps_rows:
            return (GatheredGramian if ranks.size > 1 else TrunkGramian)(tasks, shared, others, ranks, self._rows)
        at_features = window.wanted != "nothing" and window.measures_at == "features"
        return TrunkGradients(tasks, shared, others, ranks, kept=self._rows, features=at_features)

    def _forward(self, module: TaskModule, window: Window, batch: object) -> tuple[MicroBatch, Reduced]:
        """Pass one micro-batch forward, and tell everybody about its losses before any gradient is taken."""
        cast, weighting = self.cast, window.weighting
        observation = None if window.repeats else self._observation
        observed = observation is not None and observation.before_forward(module)
        trunk = module.the_trunk if cast.sharded or window.needs_split or observed else None
        split = _NOWHERE if trunk is None else Split()
        watching = split.watching(module.the_heads) if cast.sharded else _SILENT
        with self.phases.during("forward"), watching, _SILENT if trunk is None else split.applied_to(trunk):
            outputs = module.present_outputs(batch, window.resting.dropped)
        if module.sharing is not None:
            find_shared(module, cast, window, outputs, observed=observed)
        window.batches += [batch] if window.keeps_batches else []
        step_metric = None if weighting is None else weighting.step_metric
        counts = len(module.train_task_metrics) and not window.repeats
        scores = update_metrics(module, "train", outputs, step_metric) if counts else None
        kind = module.device.type
        off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _SILENT
        with off:
            if window.probes and not window.idle:
                scores = traces_of(window, cast, outputs, trainable_parameters(module)[0], unseen=not self._looked)
            reduced = reduce_losses(outputs, window.tasks, window.ranks, module.device, scores)
            all_outputs, own, beside = outputs, reduced.own, dict[str, Tensor]()
            if window.scales is not None or window.resting.head_only:
                others = trainable_parameters(module)[1] if window.resting.head_only else []
                outputs, reduced, beside = to_weigh(window, cast, outputs, reduced, others)
        if cast.steering is not None and not window.repeats:
            cast.steering.collect(module, window, batch, outputs)
        with self.phases.during("forward"):
            penalties = module.penalties_with(reduced.names) if cast.penalizes else {}
        with off:
            window.note(reduced, penalties, module.learned_tasks)
            if all_outputs:
                window.local.append((list(all_outputs), own, sample_counts(list(all_outputs.values()))))
                self.recorder.labels.add_whole(all_outputs)
            unseen, penalties = not self._looked, {**penalties, **beside}
            found = micro_batch_of(module, window, cast, reduced, outputs, penalties, split, unseen=unseen)
            if observation is not None and window.micro_batches == 1:
                with self.phases.during("monitors"):
                    observation.measure(module, reduced, found, batch)
        return found, reduced

    def _loss(self, module: TaskModule, window: Window, found: Reduced, batch: MicroBatch, last: bool) -> Tensor | None:
        """The loss to pass backward for this micro-batch; None where the step's gradients are still collected."""
        names, losses, wanted = found.names, found.losses, "nothing" if window.idle else window.wanted
        engine: MicroBatch | FeatureGradients | Collection = batch
        renews = names and window.renews and not (window.collects or window.idle)
        measured = renewed_rows(window, batch, trainable_parameters(module)[0]) if renews else Measured()
        if window.collects:
            engine = window.gradients = window.gradients or self._collection(module, window)
            if names and wanted != "nothing" and window.measures_at != "trunk":
                find_layer(module, window, batch, groups_read(batch))
            engine.add(batch, last=last)
            if not last:
                return None
            names, factors = engine.present, None
            if window.size > 1 and names:
                losses, factors = window.mean_losses(names), window.mean_factors(names)
            engine.close(losses, factors)
        elif names and window.way == "features":
            wanted = wanted if window.asks(names) else "nothing"
            parameters = functools.partial(trainable_parameters, module)
            engine = features_of(window, batch, losses, parameters, self.cast.sharded)
            if wanted != "nothing":
                find_layer(module, window, batch, engine.groups())
        if names:
            measured = engine.measure(wanted, window.layer) if wanted != "nothing" else measured
            with self.phases.during("solving"):
                decision = window.decide(names, losses, measured)
            loss = engine.surrogate_loss(decision.weights, decision.head_weights, decision.directions)
        elif batch.penalty is None:
            return None
        else:
            loss = engine.surrogate_loss(losses) if window.collects else batch.penalty
        # What is collected is the window's mean already; Lightning divides in automatic optimization, nobody else does.
        if window.size > 1 and window.collects == module.automatic_optimization:
            loss = loss * window.size if window.collects else loss / window.size
        return loss

    def _close(self, module: TaskModule, window: Window, batch_idx: int) -> None:
        """Step the optimizer, unless something is not finite, and tell weighting, monitors and loggers."""
        cast, update, automatic = self.cast, self.update, module.automatic_optimization
        steering, weights, signals = cast.steering, window.applied_weights, window.summary()
        positions = [] if signals is None else window.positions(signals.tasks)
        if automatic:
            update.awaited, update.seen = window, False
            if cast.asks_again:
                self._closed = module.trainer.fit_loop.epoch_loop.total_batch_idx, window
        else:
            if window.ranks.size > 1 or len(window.present) < len(module.tasks) or cast.whole:
                forget_absent(module, window, cast)
            window.gradients = None  # K gradients of each head need not outlive the step
        multipliers = None if steering is None else steering.rates.current(window.step)
        finite, signals, known = update.look(module, signals, multipliers)
        if steering is not None:
            steering.choose(module, known)
        if not automatic:
            with self.phases.during("optimizer"):
                again = functools.partial(pass_again, self, module, window, batch_idx)
                loss = window.mean_loss() if cast.asks_again else window.loss
                update.step(module, batch_idx, loss, again, scaler=cast.scaler, finite=finite)
                if module.trainer.lr_scheduler_configs:
                    self.recorder.due.step(module)
        if not finite or signals is None:
            self.recorder.count(window, finite=finite)
            return
        if steering is not None:
            steering.observe(window, signals)
        if (weighting := window.weighting) is not None and not window.idle:
            if weighting.wants_losses_after and window.batches:
                signals = replace(signals, losses_after=losses_after(module, window, signals.tasks))
            weighting.observe(signals, positions)
        if self._observation is not None:
            with self.phases.during("monitors"):
                self._observation.hand_over(module, signals)
        self.recorder.record_step(window, signals, positions, weights, None if steering is None else steering.effective)
