"""The cut between trunk and heads, where the gradients of all tasks meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


class FeatureCut:
    """Replaces each output z of a trunk by a detached leaf, so that heads and trunk become two graphs.

    The heads are then differentiated once, down to dL_k/dz, and the trunk as often as the method needs. Outputs may be
    nested in dicts, sequences, named tuples or dataclasses; what needs no gradient passes untouched.

    Attributes:
        outputs: The trunk's outputs, still on the trunk's graph, over all its calls in the step.
        leaves: Every leaf handed to a head, with the index of the output that it stands for.
        head_outputs: What the heads returned, where they were watched.
        readers: For each reader that was given a view of its own, the indices of the outputs that it may read.

    Example:
        >>> import torch
        >>> trunk, cut = nn.Linear(2, 3), FeatureCut()
        >>> with cut.applied_to(trunk):
        ...     z = trunk(torch.ones(1, 2))
        >>> z.is_leaf, cut.outputs[0].is_leaf, cut.leaves[z]
        (True, False, 0)
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.leaves: dict[Tensor, int] = {}
        self.calls = 0
        self.head_outputs: dict[str, list[Tensor]] = {}
        self.readers: list[frozenset[int]] = []

    @contextmanager
    def applied_to(self, trunk: nn.Module) -> Iterator[FeatureCut]:
        """Cut at every call of ``trunk`` inside the block."""
        handle = trunk.register_forward_hook(self._on_trunk_output)
        try:
            yield self
        finally:
            handle.remove()

    @contextmanager
    def watching(self, heads: nn.ModuleDict) -> Iterator[None]:
        """Remember what the heads return inside the block."""

        def remember(name: str, output: Any) -> None:  # noqa: ANN401 - any nested structure of tensors
            apply_to_collection(output, Tensor, self.head_outputs.setdefault(name, []).append)

        handles = [
            head.register_forward_hook(lambda _head, _inputs, output, name=name: remember(name, output))
            for name, head in heads.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def own_view(self, features: Any) -> Any:  # noqa: ANN401 - any nested structure of tensors
        """The same features behind leaves of their own, so that one backward pass tells the readers apart."""
        before = len(self.leaves)
        view = apply_to_collection(features, Tensor, self._fresh_leaf)
        self.readers.append(frozenset(list(self.leaves.values())[before:]))
        return view

    def _on_trunk_output(self, _trunk: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        self.calls += 1
        first = len(self.outputs)
        return apply_to_collection(output, Tensor, lambda z: self._cut(z, first))

    def _cut(self, output: Tensor, first: int) -> Tensor:
        if not output.requires_grad:
            return output
        for index in range(first, len(self.outputs)):
            if self.outputs[index] is output:
                return next(leaf for leaf, origin in self.leaves.items() if origin == index)
        return self._add_leaf(output, len(self.outputs), new=True)

    def _fresh_leaf(self, leaf: Tensor) -> Tensor:
        return self._add_leaf(leaf, self.leaves[leaf]) if leaf in self.leaves else leaf

    def _add_leaf(self, tensor: Tensor, origin: int, *, new: bool = False) -> Tensor:
        if new:
            self.outputs.append(tensor)
        leaf = tensor.detach().requires_grad_()
        self.leaves[leaf] = origin
        return leaf
