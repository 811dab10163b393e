"""The scalar whose backward pass is a micro-batch's part of an optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtl.agreement import Agreement, ghost_of_outputs, ghost_of_parameters, stack_losses
from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.feature_update import feature_objective
from lightning_mtl.gradients.micro_batch import Decision, Measured, MicroBatch
from lightning_mtl.gradients.sharded_update import sharded_feature_objective
from lightning_mtl.step_guards import check_cut
from lightning_mtl.task import TaskOutput
from lightning_mtl.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


def objective_of(
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
        return _row_objective(module, window, batch, closes=closes)
    if not batch.names and (batch.penalty is None or window.way == "losses"):
        objective = batch.penalty
    elif window.way == "losses":
        weights = window.decide(batch.names, agreed.losses, Measured()).weights
        weights = weights if batch.seeds is None else weights * batch.seeds
        here = losses if len(losses) == len(weights) else stack_losses(batch.losses, module.device)
        objective = (here * weights).sum()
        objective = objective if batch.penalty is None else objective + batch.penalty
    else:
        objective = _feature_objective(module, window, batch, agreed.losses)
    divides = objective is not None and window.size > 1 and not module.automatic_optimization
    return objective / window.size if objective is not None and divides else objective


def micro_batch_of(
    module: MultiTaskModule,
    window: Window,
    agreed: Agreement,
    outputs: dict[str, TaskOutput],
    penalties: dict[str, Tensor],
    cut: FeatureCut,
) -> MicroBatch:
    """Put this rank's losses in the form that the gradient engine reads, with what the other ranks expect of it."""
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
    scale = None if window.way == "losses" else module.gradient_scale
    every_loss = [losses.get(task, zero) for task in agreed.names]
    return MicroBatch(agreed.names, every_loss, penalty, cut, absent, seeds, scale, ranks)


def _feature_objective(module: MultiTaskModule, window: Window, batch: MicroBatch, losses: Tensor) -> Tensor:
    if batch.names:
        check_cut(batch, window)
    wanted = window.wanted if window.asks(batch.names) else "nothing"

    def decide(measured: Measured) -> Decision:
        # Without a task there is nothing to ask about; what a penalty says of the trunk's output still passes the cut.
        return window.decide(batch.names, losses, measured) if batch.names else Decision(losses.new_ones(0))

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


def _row_objective(module: MultiTaskModule, window: Window, batch: MicroBatch, *, closes: bool) -> Tensor | None:
    """Collect the micro-batch's rows; at the window's end, the scalar that writes what they combine to."""
    rows = window.rows
    assert rows is not None  # noqa: S101 - for mypy: asked for by this way alone
    if batch.names:
        check_cut(batch, window)
    if batch.names or batch.penalty is not None or closes:
        rows.add(batch, 1.0 / (window.size * window.ranks.size), last=closes)
    if not closes:
        return None
    names = rows.present
    if not names and batch.penalty is not None and not module.sharded:
        # No task in the whole window: the penalties of all its micro-batches, which the rows have collected.
        nothing = batch.penalty.new_ones(0).detach()
        return rows.objective(batch, nothing, lambda _: Decision(nothing), wanted="nothing", weighs_heads=False)
    if not names:
        return batch.penalty
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
