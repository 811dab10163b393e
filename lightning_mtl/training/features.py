"""What measures a step's gradients is chosen here: at the trunk's output, at a layer, or at all parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_mtl.gradients.features import FeatureGradients
from lightning_mtl.gradients.gathered import GatheredGramian
from lightning_mtl.gradients.layers import parameters_at
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.gradients.sharded import ShardedFeatureGradients, ShardedTrunkGradients
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.gradients.trunk_gramian import TrunkGramian
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.checks import check_accumulation, check_split, collects_shards, no_shared_parameters
from lightning_mtl.training.window import Collection, Window


def features_of(module: TaskModule, batch: MicroBatch, losses: Tensor, *, sharded: bool) -> FeatureGradients:
    """The engine for gradients at the trunk's outputs."""
    return (
        ShardedFeatureGradients(batch, losses)
        if sharded
        else FeatureGradients(batch, module.trainable_parameters, losses)
    )


def find_layer(module: TaskModule, window: Window, batch: MicroBatch, groups: Sequence[Sequence[Tensor]]) -> None:
    """Find the parameters that gradients are measured at; those of several micro-batches add up."""
    check_split(module, batch, window.weighting)
    if window.measures_at not in ("trunk", "features"):
        found = parameters_at(window.measures_at, module, groups, window.ranks, among=module.shared_parameters())
        window.layer = list(dict.fromkeys([*(window.layer or []), *found]))


def collection_of(module: TaskModule, window: Window, kept: list[Rows], *, sharded: bool) -> Collection:
    """Make ready to keep the step's gradients, task by task, where its weights are not known before its end."""
    shared, others = module.trainable_parameters()
    if window.wanted != "nothing" and window.measures_at == "trunk" and not shared:
        raise no_shared_parameters(window.weighting)
    if window.weighting is not None and window.size > 1:
        check_accumulation(window.weighting, window.size)
    tasks, ranks = tuple(module.tasks), window.ranks
    if sharded:
        if window.size > 1:
            raise collects_shards(window.weighting, window.size)
        return ShardedTrunkGradients(tasks, shared, others)
    features = window.wanted != "nothing" and window.measures_at == "features"
    # Hooks of this older kind may change a layer's weight gradient, which is never computed without rows.
    if not window.keeps_rows and not any(part._is_full_backward_hook is False for part in module.modules()):
        return (GatheredGramian if ranks.size > 1 else TrunkGramian)(tasks, shared, others, ranks, kept)
    return TrunkGradients(tasks, shared, others, ranks, kept=kept, features=features)
