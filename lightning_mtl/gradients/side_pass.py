"""Per-task gradients beside the update: measured before the ordinary backward pass, which stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.split import Split
from lightning_mtl.gradients.torch_internals import parameter_hooks_off


def gradients_beside(
    losses: Sequence[Tensor], seeds: Sequence[Tensor], split: Split, at: Sequence[Tensor] | None
) -> Iterator[Sequence[Tensor | None]]:
    """Differentiate each loss by itself, and keep every graph for the update to come.

    Args:
        losses: K losses; one without a graph has no gradients.
        seeds: K scalars that the gradients are multiplied by.
        split: The trunk's outputs.
        at: The parameters to differentiate by, None for the trunk's outputs.

    Yields:
        For each loss a gradient a parameter, or an output of the trunk; None where the loss does not depend on it.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> list(gradients_beside([(3 * w).sum(), (w * w).sum()], [torch.tensor(1.0)] * 2, Split(), [w]))
        [(tensor([3.]),), (tensor([4.]),)]
    """
    inputs = [output.edge for output in split.outputs] if at is None else list(at)
    for loss, seed in zip(losses, seeds, strict=True):
        if not inputs or not loss.requires_grad:
            yield [None] * len(inputs)
            continue
        with parameter_hooks_off(at or ()):
            found = torch.autograd.grad(loss, inputs, seed.to(loss), retain_graph=True, allow_unused=True)
        yield found
