"""The tasks' gradients on the heads' side of the cut: each head differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.micro_batch import MicroBatch


@dataclass
class HeadGradients:
    """What one loss sends down to the cut and to the parameters above it.

    Attributes:
        cotangents: dL/dz, one for each of the trunk's outputs, None where the loss does not depend on it.
        parameters: dL/dp for every parameter that the loss reaches without passing the cut.
    """

    cotangents: list[Tensor | None]
    parameters: dict[Tensor, Tensor]


def differentiate_heads(batch: MicroBatch) -> list[HeadGradients]:
    """Differentiate every loss down to the cut.

    Losses that share nothing above the cut are done in a single pass; otherwise each takes a pass of its own, through
    what it depends on and no more.

    Args:
        batch: The losses, the penalty and the cut; a loss without a graph has no gradients.

    Returns:
        One :class:`HeadGradients` a loss, and a last one for the penalty, if there is one.

    Raises:
        ValueError: If a loss does not depend on the trunk's output, naming the task.
    """
    losses = [*batch.losses] if batch.penalty is None else [*batch.losses, batch.penalty]
    seeds = _seeds(batch, losses)
    reached = [list(reached_leaves([loss])) for loss in losses]
    everything = [leaf for leaves in reached for leaf in leaves]
    if len(set(everything)) == len(everything):
        with_graph = [index for index, leaves in enumerate(reached) if leaves]
        pooled = (
            torch.autograd.grad([losses[i] for i in with_graph], everything, [seeds[i] for i in with_graph])
            if everything
            else ()
        )
        remaining = iter(pooled)
        found = [[next(remaining) for _ in leaves] for leaves in reached]
    else:
        found = [
            list(torch.autograd.grad(loss, leaves, seeds[index], retain_graph=index < len(losses) - 1))
            if leaves
            else []
            for index, (loss, leaves) in enumerate(zip(losses, reached, strict=True))
        ]
    heads = [_sort(leaves, gradients, batch.cut) for leaves, gradients in zip(reached, found, strict=True)]
    _check_reaches_trunk(batch, heads)
    return heads


def _seeds(batch: MicroBatch, losses: Sequence[Tensor]) -> list[Tensor | None]:
    """What each loss's backward pass begins with; None stands for 1."""
    if batch.seeds is None and batch.scale is None:
        return [None] * len(losses)
    shares = torch.ones(len(batch.losses), device=losses[0].device) if batch.seeds is None else batch.seeds
    shares = torch.cat([shares, shares.new_ones(len(losses) - len(shares))])
    factors = shares if batch.scale is None else shares * batch.scale
    return [factor.to(loss.dtype) for factor, loss in zip(factors.unbind(), losses, strict=True)]


def _check_reaches_trunk(batch: MicroBatch, heads: Sequence[HeadGradients]) -> None:
    for name, head in zip(batch.names, heads, strict=False):
        if name not in batch.absent and all(cotangent is None for cotangent in head.cotangents):
            raise ValueError(
                f"The loss of task {name!r} does not depend on the trunk's output, so its shared gradient cannot be "
                "measured. Compute it from what self.trunk(...) or self(...) returned in this step, undetached; or "
                "leave the task out of the losses of a batch that has no label for it."
            )


def _sort(leaves: list[Tensor], gradients: list[Tensor], cut: FeatureCut) -> HeadGradients:
    cotangents: list[Tensor | None] = [None] * len(cut.outputs)
    parameters: dict[Tensor, Tensor] = {}
    for leaf, gradient in zip(leaves, gradients, strict=True):
        origin = cut.leaves.get(leaf)
        if origin is None:
            parameters[leaf] = gradient
        else:
            before = cotangents[origin]
            cotangents[origin] = gradient if before is None else before + gradient
    return HeadGradients(cotangents, parameters)
