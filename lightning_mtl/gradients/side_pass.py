"""Per-task gradients beside the update: measured before the ordinary backward pass, which stays what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.feature_update import gradients_from_cut


@contextmanager
def watching_outputs(trunk: nn.Module, cut: FeatureCut) -> Iterator[None]:
    """Note in ``cut`` what the trunk returns inside the block, and leave the graph whole."""

    def note(_trunk: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401 - any nested structure of tensors
        apply_to_collection(output, Tensor, lambda z: cut.outputs.append(z) if z.requires_grad else None)

    handle = trunk.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def gradients_beside(
    losses: Sequence[Tensor], seeds: Sequence[Tensor], cut: FeatureCut, at: Sequence[Tensor] | None
) -> Iterator[list[Tensor | None]]:
    """Differentiate each loss by itself, and keep every graph for the update to come.

    Args:
        losses: K losses; one without a graph has no gradients.
        seeds: K scalars that the gradients are multiplied by.
        cut: The trunk's outputs, and the leaves that stand for them where the graph is cut there.
        at: The parameters to differentiate by, None for the trunk's outputs.

    Yields:
        For each loss a gradient a parameter, or a trunk's output; None where the loss does not depend on it.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> list(gradients_beside([(3 * w).sum(), (w * w).sum()], [torch.tensor(1.0)] * 2, FeatureCut(), [w]))
        [[tensor([3.])], [tensor([4.])]]
    """
    for loss, seed in zip(losses, seeds, strict=True):
        yield _gradients_of(loss, seed, cut, at)


def _gradients_of(loss: Tensor, seed: Tensor, cut: FeatureCut, at: Sequence[Tensor] | None) -> list[Tensor | None]:
    targets = list(cut.outputs if at is None else at)
    if not loss.requires_grad or not (targets or cut.leaves):
        return [None] * len(targets)
    leaves = list(cut.leaves)
    found = torch.autograd.grad(loss, [*leaves, *targets], seed.to(loss), retain_graph=True, allow_unused=True)
    cotangents: list[Tensor | None] = [None] * len(cut.outputs)
    for leaf, gradient in zip(leaves, found[: len(leaves)], strict=True):
        cotangents[cut.leaves[leaf]] = _sum(cotangents[cut.leaves[leaf]], gradient)
    direct = found[len(leaves) :]
    through = cotangents if at is None else gradients_from_cut(cut.outputs, cotangents, targets)
    return [_sum(a, b) for a, b in zip(direct, through, strict=True)] if leaves else list(direct)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
