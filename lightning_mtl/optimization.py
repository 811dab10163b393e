"""The training step: losses in, one optimizer step out, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

from lightning_mtl.callbacks import Monitor
from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.feature_update import feature_objective
from lightning_mtl.gradients.layers import last_layer, named_parameters_at
from lightning_mtl.gradients.micro_batch import Decision, Measured, MicroBatch
from lightning_mtl.gradients.row_update import RowUpdate
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.recorder import sample_counts
from lightning_mtl.schedules import step_schedulers
from lightning_mtl.task import TaskOutput
from lightning_mtl.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class Optimization:
    """Runs the training step of a :class:`~lightning_mtl.MultiTaskModule`."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self._matrix: Rows | None = None

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
        cut = FeatureCut()
        with nullcontext() if window.way == "losses" else module.cutting(cut):
            outputs = module.present_outputs(batch)
            penalties = module.penalties()
        step_metric = None if window.weighting is None else window.weighting.step_metric
        module.update_metrics("train", outputs, window.scores, step_metric)
        self._note(module, window, outputs, penalties)
        penalty = torch.stack(list(penalties.values())).sum() if penalties else None
        objective: Tensor | None = penalty
        if outputs:
            losses = [output.loss for output in outputs.values()]
            objective = self._objective(module, window, MicroBatch(list(outputs), losses, penalty, cut))
        if window.rows is not None:
            objective = self._row_objective(window, penalty) if closes else None
        elif objective is not None and not module.automatic_optimization and size > 1:
            objective = objective / size
        if objective is not None and not module.automatic_optimization:
            module.manual_backward(objective)
            objective = objective.detach()
        if closes:
            self._step(module)
            self._close(module, window)
        module.recorder.log_step(module)
        return objective

    def _open(self, module: MultiTaskModule, size: int) -> Window:
        trainer, weighting = module.trainer, module.weighting()
        window = Window(tuple(module.tasks), weighting, trainer.global_step, trainer.current_epoch, size)
        if not module.automatic_optimization:
            module.single_optimizer().zero_grad()
        if window.way == "rows":
            shared = [parameter for parameter in module.shared_parameters() if parameter.requires_grad]
            if not shared:
                raise ValueError(
                    f"{type(weighting).__name__}(at='trunk') measures gradients of the shared parameters, but none of "
                    "them can be trained; unfreeze some, override shared_parameters(), or weigh by the losses alone."
                )
            window.rows = RowUpdate(shared, tuple(module.tasks), self._matrix)
            self._matrix = window.rows.rows
        return window

    def _note(
        self, module: MultiTaskModule, window: Window, outputs: dict[str, TaskOutput], penalties: dict[str, Tensor]
    ) -> None:
        window.micro_batches += 1
        window.penalties = {name: value.detach() for name, value in penalties.items()}
        if not outputs:
            return
        found = list(outputs.values())
        losses = MicroBatch(list(outputs), [output.loss for output in found], None, FeatureCut()).stacked().detach()
        given = [output.num_samples for output in found]
        counts = None
        if any(count is not None for count in given):
            counts = torch.stack(
                [torch.as_tensor(1 if count is None else count, device=losses.device).to(losses) for count in given]
            )
        window.note(list(outputs), losses, counts)
        module.recorder.losses["train"].add(losses, sample_counts(found), window.positions(list(outputs)))

    def _objective(self, module: MultiTaskModule, window: Window, batch: MicroBatch) -> Tensor | None:
        """The scalar whose backward pass applies the weights to this micro-batch; none while rows are collected."""
        if window.way == "losses":
            stacked = batch.stacked()
            weighted = (stacked * window.decide(batch.names, stacked.detach(), Measured()).weights).sum()
            return weighted if batch.penalty is None else weighted + batch.penalty
        _check_cut(module, batch.cut, window)
        if window.rows is not None:
            factors = window.newest_counts() if window.size > 1 else [1.0] * len(batch.names)
            window.rows.add(batch, factors, 1.0 / window.size)
            return None
        wanted = window.wanted if window.asks(batch.names) else "nothing"
        at = window.weighting.at if window.weighting is not None else "features"
        layer = None
        if wanted != "nothing" and at == "last_layer":
            layer = last_layer(module.trunk, batch.cut)
        elif wanted != "nothing" and at != "features":
            layer = named_parameters_at(module, [at] if isinstance(at, str) else at)

        def decide(measured: Measured) -> Decision:
            return window.decide(batch.names, batch.stacked().detach(), measured)

        return feature_objective(batch, decide, wanted=wanted, layer=layer, weighs_heads=window.weighs_heads)

    def _row_objective(self, window: Window, penalty: Tensor | None) -> Tensor | None:
        """The scalar whose backward pass writes the direction that the window's rows combine to."""
        rows = window.rows
        assert rows is not None  # noqa: S101 - for mypy: asked for by this way alone
        names = rows.present
        if not names:
            return None if penalty is None else penalty / window.size
        if window.size > 1:
            _, counts = window.sums()
            for name, count in zip(names, counts[window.positions(names)].tolist(), strict=True):
                rows.scale(name, window.micro_batches / window.size / count)
        losses = window.mean_losses(names)
        value = losses.sum() if penalty is None else losses.sum() + penalty.detach()
        return rows.objective(
            value,
            lambda measured: window.decide(names, losses, measured),
            wanted=window.wanted,
            weighs_heads=window.weighs_heads,
        )

    def _step(self, module: MultiTaskModule) -> None:
        if module.automatic_optimization:
            return
        optimizer = module.single_optimizer()
        with _clipping(module, optimizer):
            optimizer.step()
        step_schedulers(module, module.schedules, "step", plateau=False)
        if module.trainer.is_last_batch:
            step_schedulers(module, module.schedules, "epoch", plateau=False)
        module.recorder.plateau_due()

    def _close(self, module: MultiTaskModule, window: Window) -> None:
        """Tell weighting, monitors and loggers what the step has shown."""
        self.window = None
        signals = window.summary()
        if signals is None:
            return
        if window.weighting is not None:
            window.weighting.observe(signals, window.positions(signals.tasks))
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Monitor):
                callback.observe(module.trainer, module, signals, window.weights)
        vectors: dict[str, tuple[Sequence[str], Tensor]] = {"loss": (signals.tasks, signals.losses)}
        if signals.norms is not None:
            vectors["grad_norm"] = (signals.tasks, signals.norms)
        if window.weights is not None:
            vectors["weight"] = (signals.tasks, window.weights[window.positions(signals.tasks)])
        module.recorder.record_step(vectors, {f"penalty/{name}": value for name, value in window.penalties.items()})


@contextmanager
def _clipping(module: MultiTaskModule, optimizer: LightningOptimizer) -> Iterator[None]:
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


def _check_cut(module: MultiTaskModule, cut: FeatureCut, window: Window) -> None:
    name, at = type(window.weighting).__name__, getattr(window.weighting, "at", None)
    if not cut.calls:
        raise ValueError(
            f"{name}(at={at!r}) measures gradients at the trunk, but the trunk was not called in this step; call "
            "self(inputs) or self.trunk(inputs) in task_losses, not one of the trunk's parts."
        )
    if not cut.outputs:
        raise ValueError(
            f"{name}(at={at!r}) measures gradients at the trunk, but nothing the trunk returned requires a gradient; "
            "unfreeze some of it, or weigh by the losses alone."
        )
