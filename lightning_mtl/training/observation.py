"""Monitors are measured for beside the update, and told after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.feature_measurement import feature_blocks, groups_read, outputs_read
from lightning_mtl.gradients.graph import above_split
from lightning_mtl.gradients.inner_products import Measured, gramian
from lightning_mtl.gradients.layers import parameters_at
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.rows import Rows, as_real
from lightning_mtl.gradients.side_pass import gradients_beside
from lightning_mtl.method.signals import Signals
from lightning_mtl.monitors.base import Monitor, guarding, turn_off_if_slow, turned_off_elsewhere
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.evaluation import second_look
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.snapshots import Snapshot
from lightning_mtl.training.window import Window

Place = str | tuple[str, ...]


class Observation:
    """The monitors that are due in a window, and what was measured for them.

    A Gramian that the weighting measures at the same place serves its monitors, too. For the rest the window's first
    micro-batch is differentiated task by task before the ordinary backward pass, whose graph is kept: the update does
    not know of it. Collectives come at fixed points, outside of any monitor's code, and a rank on which something
    failed takes part in them and says so.

    Args:
        module: What is trained.
        window: The optimizer step, not yet begun.
        monitors: Those of the Trainer.
        scaler: The gradient scaler of half precision, if there is one.

    Attributes:
        due: The monitors that look at this step.
        passes_again: Whether some step of the training may pass the graph once more for a monitor.
    """

    def __init__(self, module: TaskModule, window: Window, monitors: Sequence[Monitor], scaler: Any) -> None:  # noqa: ANN401
        monitors = [monitor for monitor in monitors if not monitor._gone]
        self.passes_again = any(m.measures != "losses" for m in monitors)
        self.due = [m for m in monitors if m.measures_in(window.step)]
        self._window, self._scaler = window, scaler
        self._found: dict[Monitor, Signals] = {}
        self._before: Snapshot | None = None
        for monitor in self.due:
            turn_off_if_slow(monitor, module.device)
        # A weighting that measures a Gramian at the same place has it for the monitor, too: no pass of its own.
        beside = [m for m in self.due if m.measures != "losses" and not self._supplied(m)]
        if beside and window.ranks.size > 1:
            flags = window.ranks.sum(torch.tensor([float(m.off) for m in beside], device=module.device))
            for monitor, flag in zip(beside, flags.tolist(), strict=True):
                if flag:
                    turned_off_elsewhere(monitor)
        self._beside: dict[Place, list[Monitor]] = {}
        for monitor in beside:
            if not monitor.off:
                self._beside.setdefault(_place(monitor.at), []).append(monitor)

    @property
    def measures(self) -> bool:
        """Whether gradients are measured beside the update of the coming micro-batch."""
        return bool(self._beside) and not self._window.micro_batches

    def before_forward(self, module: TaskModule) -> bool:
        """Keep what the window's first forward pass begins with, for monitors that look ahead.

        Returns:
            Whether gradients are measured beside the update.
        """
        if self.measures and any(monitor.looks_ahead for members in self._beside.values() for monitor in members):
            self._before = Snapshot(module, module.device)
        return self.measures

    def measure(self, module: TaskModule, reduced: Reduced, batch: MicroBatch, given: Any) -> None:  # noqa: ANN401
        """Measure for the monitors that no weighting serves, before the micro-batch's backward pass.

        Args:
            module: What is trained.
            reduced: The losses over all ranks.
            batch: This rank's losses, with their graphs.
            given: The batch as the loader yielded it.
        """
        if not self._beside or not reduced.names or _would_hang(module, reduced, batch):
            return
        scale = None if self._scaler is None else self._scaler.scale(torch.ones((), device=module.device))
        # The gradient of the mean over all ranks is the sum of what each adds by its share of the samples.
        shares = reduced.shares()
        shares = torch.ones(len(reduced.names), device=module.device) if shares is None else shares
        seeds = list((shares if scale is None else shares * scale).unbind())
        for place, members in self._beside.items():
            if place == "trunk" and module.sharing is not None and not module.sharing.shared:
                continue  # nothing is known to be shared yet
            rows = None
            with guarding(members, module.device), _leaving_no_trace(module):
                rows = _rows_at(place, module, batch, seeds)
            if not _everywhere(rows is not None, members, batch.ranks, module.device) or rows is None:
                continue
            with guarding(members, module.device):
                measured = Measured.of_products(_sum_and_multiply(rows, batch.ranks, scale))
                losses = reduced.losses.to(torch.promote_types(reduced.losses.dtype, torch.float32))
                window = self._window
                signals = Signals(
                    tuple(reduced.names), losses, window.step, window.epoch, measured.norms, measured.gramian
                )
                self._found.update(dict.fromkeys(members, signals))
            for monitor in members:
                if monitor.looks_ahead and isinstance(rows, Rows):
                    self._look_ahead(monitor, module, rows, scale, shares, reduced.names, given)

    def hand_over(self, module: TaskModule, signals: Signals) -> None:
        """Call the monitors, once the step has been taken."""
        # In the Trainer's order, after the update: nothing that a monitor does can reach the step any more.
        for monitor in self.due:
            seen = signals if monitor.measures == "losses" or self._supplied(monitor) else self._found.get(monitor)
            if monitor.off or seen is None:
                continue
            if monitor.measures != "losses" and (seen.gramian is None or not bool(seen.gramian.isfinite().all())):
                continue
            with guarding([monitor], module.device):
                monitor.observe(module.trainer, module, seen, self._window.applied_weights)

    def _supplied(self, monitor: Monitor) -> bool:
        """Whether the weighting measures in this step what the monitor asks for."""
        return (
            self._window.wanted == "gramian"
            and self._window.weighting is not None
            and _place(self._window.weighting.at) == _place(monitor.at)
            and not monitor.looks_ahead
        )

    def _look_ahead(
        self,
        monitor: Monitor,
        module: TaskModule,
        rows: Rows,
        scale: Tensor | None,
        shares: Tensor,
        names: Sequence[str],
        given: Any,  # noqa: ANN401
    ) -> None:
        table, ranks = None, self._window.ranks
        with guarding([monitor], module.device), _leaving_no_trace(module):
            # Rows have the scaler's factor still, and the trial step must not.
            rate = monitor.lookahead_rate(module) / (1.0 if scale is None else float(scale))
            dtype = self._found[monitor].losses.dtype
            table = self._losses_ahead(module, rows, rate, names, given, dtype) * shares
            if self._window.scales is not None:
                table = table / self._window.scales.of(self._window.positions(names))
        if _everywhere(table is not None, [monitor], ranks, module.device) and table is not None:
            self._found[monitor] = replace(self._found[monitor], losses_ahead=ranks.sum(table))

    @torch.no_grad()
    def _losses_ahead(
        self,
        module: TaskModule,
        rows: Rows,
        rate: float,
        names: Sequence[str],
        given: Any,  # noqa: ANN401
        dtype: torch.dtype,
    ) -> Tensor:
        """This rank's losses, ``[K, K]``, after a step of descent along each row, all from the same beginning."""
        starts = [parameter.detach().clone() for parameter in rows.parameters]
        table = torch.zeros(len(names), len(names), dtype=dtype, device=module.device)
        try:
            for task in range(len(names)):
                steps = rows.split([matrix[task] for matrix in rows.matrices()])
                for parameter, start, step in zip(rows.parameters, starts, steps, strict=True):
                    if step is not None:
                        # Not counted as a change by autograd, which holds these values for the backward pass to come.
                        parameter.data.copy_(start - rate * step)
                if self._before is not None:
                    self._before.put_back()  # the random numbers that the losses were computed with
                torch.clear_autocast_cache()  # which holds the parameters in half precision, as they were
                with module.trainer.precision_plugin.train_step_context(), second_look(module):
                    outputs = module.present_outputs(given, self._window.resting.dropped)
                for other, name in enumerate(names):
                    if name in outputs:
                        table[task, other] = outputs[name].loss
        finally:
            for parameter, start in zip(rows.parameters, starts, strict=True):
                parameter.data.copy_(start)
            torch.clear_autocast_cache()
        return table


def _place(at: str | Sequence[str]) -> Place:
    return at if isinstance(at, str) else tuple(at)


@contextmanager
def _leaving_no_trace(module: TaskModule) -> Iterator[None]:
    """Put back what passes inside the block change: buffers, where activations are recomputed, and random numbers."""
    snapshot = Snapshot(module, module.device)
    try:
        yield
    finally:
        snapshot.put_back()


def _would_hang(module: TaskModule, reduced: Reduced, batch: MicroBatch) -> bool:
    """Whether a backward pass that only some ranks have would wait for the others, inside of a layer."""
    if batch.ranks.size == 1 or not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        return False
    lacking = float(bool(set(reduced.names) & set(batch.absent)))
    return bool(batch.ranks.sum(torch.tensor(lacking, device=module.device)))


def _rows_at(place: Place, module: TaskModule, batch: MicroBatch, seeds: Sequence[Tensor]) -> Rows | list[Tensor]:
    """Each task's gradient of this rank's loss, ``[K, n]``; matrices alone for gradients of the samples' features."""
    depends = any(loss.requires_grad for loss in batch.losses)
    if place == "features":
        read = outputs_read(batch, [above_split(loss, batch.split.stops) for loss in batch.losses])
        features = list(gradients_beside(batch.losses, seeds, [output.edge for output in read]))
        if depends and all(gradient is None for own in features for gradient in own):
            raise _out_of_reach(place)
        if not read:  # a rank whose batch is empty
            return [torch.zeros(len(batch.losses), 1, device=module.device)]
        return [as_real(block) for block in feature_blocks(read, features)]
    parameters = _parameters_at(place, module, batch)
    rows = Rows(parameters, len(batch.losses))
    for task, gradients in enumerate(gradients_beside(batch.losses, seeds, parameters)):
        rows.add(task, gradients)
    if depends and not rows.used:
        raise _out_of_reach(place)
    return rows


def _out_of_reach(place: Place) -> ValueError:
    return ValueError(
        f"no task's loss depends on what lies at {place!r}; activation checkpoints with use_reentrant=True hide it, "
        "for instance"
    )


def _parameters_at(place: Place, module: TaskModule, batch: MicroBatch) -> list[Tensor]:
    if place == "trunk":
        shared: list[Tensor] = [parameter for parameter in module.shared_parameters() if parameter.requires_grad]
        if not shared:
            raise ValueError("at='trunk' finds no shared parameter that can be trained; measure at 'features'")
        return shared
    trunk = [] if module.the_trunk is None else module.the_trunk.parameters()
    return parameters_at(place, module, groups_read(batch), batch.ranks, among=trunk)


def _sum_and_multiply(rows: Rows | list[Tensor], ranks: Ranks, scale: Tensor | None) -> Tensor:
    """The Gramian over all ranks' samples: rows of parameters are summed, products of the samples' own features are."""
    if not isinstance(rows, Rows):
        return gramian(rows, ranks, scale=scale)
    rows.sum_over(ranks)
    return gramian(rows.matrices(), scale=scale)


def _everywhere(succeeded: bool, members: Sequence[Monitor], ranks: Ranks, device: torch.device) -> bool:
    """Whether all ranks have what they are about to sum; if one has not, its monitors end on all."""
    if ranks.size == 1:
        return succeeded
    failures = ranks.sum(torch.tensor(float(not succeeded), device=device))
    if failures:
        for monitor in members:
            turned_off_elsewhere(monitor)
    return not failures
