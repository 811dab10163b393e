"""The tasks' gradients on the heads' side of the cut: each head differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.graph import reached_leaves


@dataclass
class HeadGradients:
    """What one loss sends down to the cut and to the parameters above it.

    Attributes:
        cotangents: dL/dz, one for each of the trunk's outputs, None where the loss does not depend on it.
        parameters: dL/dp for every parameter that the loss reaches without passing the cut.
    """

    cotangents: list[Tensor | None]
    parameters: dict[Tensor, Tensor]


def differentiate_heads(losses: Sequence[Tensor], cut: FeatureCut) -> list[HeadGradients]:
    """Differentiate every loss down to the cut.

    Losses that share nothing above the cut are done in a single pass; otherwise each takes a pass of its own, through
    what it depends on and no more.

    Args:
        losses: Scalars with their graphs; a loss without one has no gradients.
        cut: Where the trunk ends.

    Returns:
        One :class:`HeadGradients` a loss.
    """
    reached = [list(reached_leaves([loss])) for loss in losses]
    everything = [leaf for leaves in reached for leaf in leaves]
    if len(set(everything)) == len(everything):
        with_graph = [loss for loss, leaves in zip(losses, reached, strict=True) if leaves]
        pooled = torch.autograd.grad(with_graph, everything) if everything else ()
        remaining = iter(pooled)
        found = [[next(remaining) for _ in leaves] for leaves in reached]
    else:
        found = [
            list(torch.autograd.grad(loss, leaves, retain_graph=index < len(losses) - 1)) if leaves else []
            for index, (loss, leaves) in enumerate(zip(losses, reached, strict=True))
        ]
    return [_sort(leaves, gradients, cut) for leaves, gradients in zip(reached, found, strict=True)]


def check_reaches_trunk(names: Sequence[str], heads: Sequence[HeadGradients]) -> None:
    """Refuse a task whose loss does not depend on the trunk's output; further heads, of penalties, may do as they like.

    Raises:
        ValueError: Naming the task.
    """
    for name, head in zip(names, heads, strict=False):
        if all(cotangent is None for cotangent in head.cotangents):
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
