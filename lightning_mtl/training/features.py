"""Gradients at the trunk's output or at a layer are measured here, where a weighting asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_mtl.gradients.features import FeatureGradients
from lightning_mtl.gradients.layers import parameters_at
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.sharded import ShardedFeatureGradients
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.checks import check_split
from lightning_mtl.training.window import Window


def features_of(
    window: Window,
    batch: MicroBatch,
    losses: Tensor,
    parameters: Callable[[], tuple[list[Tensor], list[Tensor]]],
    sharded: bool,
) -> FeatureGradients:
    """The engine for gradients at the trunk's outputs."""
    if sharded:
        return ShardedFeatureGradients(batch, losses)
    return FeatureGradients(batch, parameters, losses, in_full=window.keeps_rows)


def find_layer(module: TaskModule, window: Window, batch: MicroBatch, groups: Sequence[Sequence[Tensor]]) -> None:
    """Find the parameters that gradients are measured at; those of several micro-batches add up."""
    check_split(module, batch, window.weighting)
    if window.measures_at not in ("trunk", "features"):
        found = parameters_at(window.measures_at, module, groups, window.ranks, among=module.shared_parameters())
        window.layer = list(dict.fromkeys([*(window.layer or []), *found]))
