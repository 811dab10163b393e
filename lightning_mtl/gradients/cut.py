"""The cut between trunk and heads, where the gradients of all tasks meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import Node


@dataclass
class _Reading:
    """How one of the trunk's outputs is read.

    Attributes:
        origin: The output's index.
        handed: The tensors handed out for it and how often each had been written into; readers get the last one.
        made_by: The last one's node in the graph.
        writes_below: How often the output itself had been written into.
        written: Whether a reader has written into the last one.
    """

    origin: int
    handed: dict[Tensor, int]
    made_by: Node | None
    writes_below: int
    written: bool = False

    @property
    def newest(self) -> Tensor:
        return next(reversed(self.handed))


class FeatureCut:
    """Replaces each output z of a trunk by a leaf with the same memory, so that heads and trunk become two graphs.

    The heads are then differentiated once, down to dL_k/dz, and the trunk as often as the method needs. Outputs may be
    nested in dicts, sequences, named tuples or dataclasses; what needs no gradient passes untouched.

    Readers get the leaf through an operation that does nothing, so that they may write in place as if there were no
    cut: later readers see what they wrote and differentiate through it, and autograd refuses the backward pass where
    something needs the value that was overwritten.

    Attributes:
        outputs: The trunk's outputs, still on the trunk's graph, over all its calls in the step.
        leaves: Every leaf that a reader's graph ends in, with the index of the output that it stands for.
        head_outputs: What the heads returned, where they were watched.
        readers: For each reader that was given a view of its own, the indices of the outputs that it may read.

    Example:
        >>> trunk, cut = nn.Linear(2, 3), FeatureCut()
        >>> with cut.applied_to(trunk):
        ...     z = trunk(torch.ones(1, 2))
        >>> z.mul_(2).sum().backward()
        >>> [(leaf.grad, origin) for leaf, origin in cut.leaves.items()], trunk.weight.grad
        ([(tensor([[2., 2., 2.]]), 0)], None)
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.leaves: dict[Tensor, int] = {}
        self._readings: dict[Tensor, _Reading] = {}
        self.calls = 0
        self.head_outputs: dict[str, list[Tensor]] = {}
        self.readers: list[frozenset[int]] = []

    @contextmanager
    def applied_to(self, trunk: nn.Module) -> Iterator[FeatureCut]:
        """Cut at every call of ``trunk`` inside the block.

        Raises:
            ValueError: If what was written in place into an output reached readers that know nothing of it.
        """
        handle = trunk.register_forward_hook(self._on_trunk_output)
        try:
            yield self
            # Twice: an output that shares its memory with a later one learns in the second round that it was written.
            for reading in [*self._readings.values()] * 2:
                self._take_note(reading)
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
        if isinstance(features, Tensor):
            self._note_reader([features])
            return self._own(features)
        own: dict[Tensor, Tensor] = {}  # a tensor that comes twice is one to its reader, too
        view = apply_to_collection(features, Tensor, lambda z: own[z] if z in own else own.setdefault(z, self._own(z)))
        self._note_reader(own)
        return view

    def _note_reader(self, read: Iterable[Tensor]) -> None:
        self.readers.append(frozenset(self._readings[z].origin for z in read if z in self._readings))

    # A trunk that is compiled in place would take its hooks along.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it returns
    def _on_trunk_output(self, _trunk: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        self.calls += 1
        first = len(self.outputs)
        return apply_to_collection(output, Tensor, lambda z: self._cut(z, first))

    def _cut(self, output: Tensor, first: int) -> Tensor:
        if not output.requires_grad:
            return output
        for index in range(first, len(self.outputs)):
            if self.outputs[index] is output:
                return next(features for features, reading in self._readings.items() if reading.origin == index)
        self.outputs.append(output)
        features = self._hand_out(len(self.outputs) - 1)
        self._readings[features] = _Reading(len(self.outputs) - 1, {features: 0}, features.grad_fn, output._version)
        return features

    def _own(self, features: Tensor) -> Tensor:
        reading = self._readings.get(features)
        if reading is None:
            return features
        self._take_note(reading)
        if not reading.written:  # what was written belongs to the later readers' graphs, too
            newest = self._hand_out(reading.origin)
            reading.handed[newest] = 0
            reading.made_by = newest.grad_fn
        return reading.newest

    def _hand_out(self, origin: int) -> Tensor:
        leaf = self.outputs[origin].detach().requires_grad_()
        self.leaves[leaf] = origin
        # The same memory, but no view in autograd's book-keeping, which forbids to write into a view of a leaf.
        features: Tensor = torch.ops.aten._unsafe_view.default(leaf, leaf.shape)
        return features

    def _take_note(self, reading: _Reading) -> None:
        """Let autograd know of what was written: all that is handed out counts its writes by itself."""
        output = self.outputs[reading.origin]
        written = [z for z, before in reading.handed.items() if z._version != before]
        if not written and output._version == reading.writes_below:
            return
        newest, base = reading.newest, output._base if output._is_view() else output
        by_newest = bool(written) and all(z is newest for z in written) and newest.grad_fn is not reading.made_by
        if not by_newest or base is None or base.is_leaf:
            raise ValueError(
                f"An output of the trunk, of shape {list(output.shape)}, was written in place where its gradient can "
                "not follow: through another tensor with the same memory, without gradients, or into a parameter that "
                "the trunk returned. Let the head that writes begin out of place, nn.ReLU() for "
                "nn.ReLU(inplace=True), or with a clone()."
            )
        torch.autograd.graph.increment_version([output, *(z for z in reading.handed if z is not newest)])
        reading.handed = {z: z._version for z in reading.handed}
        reading.writes_below, reading.written = output._version, True
