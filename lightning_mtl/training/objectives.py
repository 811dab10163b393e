"""The loss whose backward pass is a micro-batch's part of an optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mtl.gradients.feature_measurement import groups_read
from lightning_mtl.gradients.features import FeatureGradients
from lightning_mtl.gradients.micro_batch import Measured, MicroBatch
from lightning_mtl.gradients.sharded import ShardedFeatureGradients, ShardedTrunkGradients
from lightning_mtl.gradients.split import Split
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.task import TaskOutput
from lightning_mtl.training.checks import check_accumulation, collects_shards
from lightning_mtl.training.guards import check_split, no_shared_parameters
from lightning_mtl.training.losses import Agreement, ghost_of_outputs, ghost_of_parameters
from lightning_mtl.training.window import Window

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


def loss_of(
    module: MultiTaskModule, window: Window, agreed: Agreement, batch: MicroBatch, *, closes: bool
) -> Tensor | None:
    """The loss to pass backward for this micro-batch; None where the step's gradients are still collected."""
    if window.collects:
        loss = _collected_loss(module, window, batch, closes=closes)
        # Automatic optimization divides by the number of micro-batches what is already their mean.
        return loss * window.size if loss is not None and module.automatic_optimization else loss
    if not batch.names:
        loss = batch.penalty
    elif window.way == "losses":
        decision = window.decide(batch.names, agreed.losses, Measured())
        loss = batch.with_penalty(batch.weighted_sum(decision.weights))
    else:
        loss = _feature_loss(module, window, batch, agreed.losses)
    divides = loss is not None and window.size > 1 and not module.automatic_optimization
    return loss / window.size if loss is not None and divides else loss


def micro_batch_of(
    module: MultiTaskModule,
    window: Window,
    agreed: Agreement,
    outputs: dict[str, TaskOutput],
    penalties: dict[str, Tensor],
    split: Split,
) -> MicroBatch:
    """Put this rank's losses in the form that the gradient engine reads, with what the other ranks expect of it."""
    ranks = window.ranks
    penalty = torch.stack(list(penalties.values())).sum() if penalties else None
    absent = [task for task in module.tasks if task not in outputs]
    zero = agreed.losses.new_zeros(())
    losses = {task: output.loss for task, output in outputs.items()}
    if ranks.size > 1 and not window.collects and len(agreed.names) < len(module.tasks):
        window.note_reached([*losses.values(), *penalties.values()])
    # The ranks' collectives expect every parameter in the graph, on every rank and in every step.
    ghosts: list[Tensor] = []
    if module.sharded:
        losses.update((task, ghost_of_outputs(split.head_outputs.get(task, ()), zero)) for task in absent)
        ghosts = [losses[task] for task in absent if task not in agreed.names]
    elif ranks.size > 1 and absent and window.collects:
        # Layers that wait for the other ranks in each backward pass, one a task, wait here, too.
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            stand_in = ghost_of_outputs([output.s for output in split.outputs], zero)
            losses.update((task, stand_in) for task in absent)
    elif ranks.size > 1 and absent:
        ghosts = [ghost_of_parameters(module, zero)]
    if ghosts:
        penalty = torch.stack([*ghosts, *([] if penalty is None else [penalty])]).sum()
    if penalty is not None and window.collects and window.size > 1:
        penalty = penalty / window.size
    seeds = agreed.own_counts if window.collects and window.size > 1 else agreed.shares()
    if ranks.size == 1 and window.size == 1:
        seeds = None
    elif seeds is not None and (not window.collects or module.sharded):
        seeds = seeds * ranks.size  # what the average over the ranks divides by
    scale = module.gradient_scale if window.collects or window.way == "features" else None
    every_loss = [losses.get(task, zero) for task in agreed.names]
    return MicroBatch(agreed.names, every_loss, penalty, split, absent, seeds, scale, ranks)


def _feature_loss(module: MultiTaskModule, window: Window, batch: MicroBatch, losses: Tensor) -> Tensor:
    """Measure at the trunk's output or at a layer, ask the weighting, and apply what it says."""
    wanted = window.wanted if window.asks(batch.names) else "nothing"
    engine: FeatureGradients
    if module.sharded:
        engine = ShardedFeatureGradients(batch, losses)
    else:
        engine = FeatureGradients(batch, module.trainable_parameters, losses)
    layer = None
    if wanted != "nothing":
        check_split(module, batch, window)
        window.add_layer(module, engine.groups())
        layer = window.layer
    decision = window.decide(batch.names, losses, engine.measure(wanted, layer))
    return engine.surrogate_loss(decision.weights, decision.head_weights, decision.directions)


def open_collection(module: MultiTaskModule, window: Window) -> TrunkGradients | ShardedTrunkGradients:
    """Make ready to keep the step's gradients, task by task, where its weights are not known before its end."""
    shared, others = module.trainable_parameters()
    if window.wanted != "nothing" and window.measures_at == "trunk" and not shared:
        raise no_shared_parameters(window)
    if window.weighting is not None:
        check_accumulation(window.weighting, window.size)
    if module.sharded:
        if window.size > 1:
            raise collects_shards(window.weighting, window.size)
        return ShardedTrunkGradients(tuple(module.tasks), shared, others)
    optimization = module.optimization
    engine = TrunkGradients(
        tuple(module.tasks),
        shared,
        others,
        window.ranks,
        rows=optimization.matrix,
        features=window.wanted != "nothing" and window.measures_at == "features",
    )
    optimization.matrix = engine.rows
    return engine


def _collected_loss(module: MultiTaskModule, window: Window, batch: MicroBatch, *, closes: bool) -> Tensor | None:
    """Collect the micro-batch's gradients; at the step's end, the loss that writes what they combine to."""
    if window.gradients is None:
        window.gradients = open_collection(module, window)
    engine = window.gradients
    if batch.names and window.wanted != "nothing" and window.measures_at != "trunk":
        check_split(module, batch, window)
        window.add_layer(module, groups_read(batch))
    engine.add(batch, last=closes)
    if not closes:
        return None
    names = engine.present
    if not names and batch.penalty is None:
        return None
    losses = window.mean_losses(names) if names else torch.zeros(0, device=module.device)
    counts = window.sums()[1][window.positions(names)] if window.size > 1 and names else None
    engine.close(losses, None if counts is None else window.micro_batches / window.size / counts)
    if not names:
        return engine.surrogate_loss(losses)
    decision = window.decide(names, losses, engine.measure(window.wanted, window.layer))
    return engine.surrogate_loss(decision.weights, decision.head_weights, decision.directions)
