"""Per-task gradients are measured here beside the update, before the ordinary backward pass, which stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.gradients.torch_internals import parameter_hooks_off


def gradients_beside(
    losses: Sequence[Tensor], seeds: Sequence[Tensor], inputs: Sequence[Any]
) -> Iterator[Sequence[Tensor | None]]:
    """Differentiate each loss by itself, and keep every graph for the update to come.

    Args:
        losses: K losses; one without a graph has no gradients.
        seeds: K scalars that the gradients are multiplied by.
        inputs: The parameters to differentiate by, or edges of the graph.

    Yields:
        For each loss a gradient an input; None where the loss does not depend on it.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> list(gradients_beside([(3 * w).sum(), (w * w).sum()], [torch.tensor(1.0)] * 2, [w]))
        [(tensor([3.]),), (tensor([4.]),)]
    """
    parameters = [given for given in inputs if isinstance(given, Tensor)]
    for loss, seed in zip(losses, seeds, strict=True):
        if not inputs or not loss.requires_grad:
            yield [None] * len(inputs)
            continue
        with parameter_hooks_off(parameters):
            found = torch.autograd.grad(loss, inputs, seed.to(loss), retain_graph=True, allow_unused=True)
        yield found
