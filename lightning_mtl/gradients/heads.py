"""The tasks' gradients on the heads' side of the cut: each head differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.gradients.compiled import check_repeatable
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


class HeadPasses:
    """The backward passes from the losses down to the cut, each through what its loss depends on and no more.

    Args:
        batch: The losses, the penalty and the cut; a loss without a graph has no gradients. The penalty comes last.

    Raises:
        ValueError: If a loss does not depend on the trunk's output, naming the task.
    """

    def __init__(self, batch: MicroBatch) -> None:
        self._batch = batch
        self._losses = [*batch.losses] if batch.penalty is None else [*batch.losses, batch.penalty]
        self._seeds = _seeds(batch, self._losses)
        self._reached = [list(reached_leaves([loss])) for loss in self._losses]
        self.everything = [leaf for leaves in self._reached for leaf in leaves]
        self.disjoint = len(set(self.everything)) == len(self.everything)
        if not self.disjoint:
            check_repeatable(self._losses)
        for index, name in enumerate(batch.names):
            if name not in batch.absent and not self.reaches_trunk(index):
                raise ValueError(
                    f"The loss of task {name!r} does not depend on the trunk's output, so its shared gradient cannot "
                    "be measured. Compute it from what self.trunk(...) or self(...) returned in this step, undetached; "
                    "or leave the task out of the losses of a batch that has no label for it."
                )

    def __len__(self) -> int:
        return len(self._losses)

    def reaches_trunk(self, index: int) -> bool:
        """Whether a loss depends on the trunk's output."""
        return any(leaf in self._batch.cut.leaves for leaf in self._reached[index])

    def one(self, index: int) -> HeadGradients:
        """Differentiate one loss; the graph is kept while others may need parts of it."""
        leaves = self._reached[index]
        if not leaves:
            return _sort([], [], self._batch.cut)
        # A penalty may come from inside the trunk, whose graph is needed once more.
        keeps = (not self.disjoint and index < len(self) - 1) or index >= len(self._batch.losses)
        gradients = torch.autograd.grad(self._losses[index], leaves, self._seeds[index], retain_graph=keeps)
        return _sort(leaves, gradients, self._batch.cut)

    def all(self) -> list[HeadGradients]:
        """Differentiate all losses, in a single pass where they share nothing above the cut."""
        if not self.disjoint or not self.everything:
            return [self.one(index) for index in range(len(self))]
        with_graph = [index for index, leaves in enumerate(self._reached) if leaves]
        losses, seeds = [self._losses[i] for i in with_graph], [self._seeds[i] for i in with_graph]
        # A penalty may come from inside the trunk, whose graph is needed once more.
        keeps = self._batch.penalty is not None
        remaining = iter(torch.autograd.grad(losses, self.everything, seeds, retain_graph=keeps))
        return [_sort(leaves, [next(remaining) for _ in leaves], self._batch.cut) for leaves in self._reached]


def _seeds(batch: MicroBatch, losses: Sequence[Tensor]) -> list[Tensor | None]:
    """What each loss's backward pass begins with; None stands for 1."""
    if batch.seeds is None and batch.scale is None:
        return [None] * len(losses)
    shares = torch.ones(len(batch.losses), device=losses[0].device) if batch.seeds is None else batch.seeds
    shares = torch.cat([shares, shares.new_ones(len(losses) - len(shares))])
    factors = shares if batch.scale is None else shares * batch.scale
    return [factor.to(loss.dtype) for factor, loss in zip(factors.unbind(), losses, strict=True)]


def _sort(leaves: Sequence[Tensor], gradients: Sequence[Tensor], cut: FeatureCut) -> HeadGradients:
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
