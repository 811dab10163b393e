"""The split between trunk and heads remembers the trunk's outputs where the heads begin to read them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_mtl.gradients.torch_internals import (
    has_gradient_hooks,
    is_functorch_wrapped,
    owner_of_memory,
    times_written,
)


class Output(NamedTuple):
    """One output of the trunk.

    Attributes:
        z: The output, as the trunk made it.
        s: The view of it that the heads read.
        version: How often z had been written into when it was handed out.
        edge: Where dL/ds arrives, which is dL/dz of everything that reads s.
        below: Where a gradient leaves for the trunk.
        written: The same output where a head has written into it: its gradient then arrives where the memory came from.
    """

    z: Tensor
    s: Tensor
    version: int
    edge: GradientEdge
    below: GradientEdge
    written: tuple[Tensor, GradientEdge]

    @property
    def key(self) -> tuple[Node, int]:
        """What an operation that reads the output names among its ``next_functions``."""
        return self.edge.node, self.edge.output_nr


class Split:
    """Hands out each output z of a trunk as a view s of it, and remembers both; the graph stays whole.

    Gradients are measured at s and sent on into z. Two outputs of one call may depend on each other, as the levels of
    a feature pyramid do; their views never do, so that what arrives at one view contains nothing of another's.

    A view follows what a head writes in place into it, as without a split. Outputs may be nested in mappings,
    sequences, named tuples or dataclasses; what needs no gradient is passed on untouched.

    Attributes:
        outputs: The trunk's outputs over all its calls in the step.
        stops: Where a walk from a loss toward the trunk ends: the outputs' keys, each with its index.
        calls: How often the trunk was called.
        head_outputs: What the heads returned, where they were watched.

    Example:
        >>> trunk, split = nn.Linear(2, 3), Split()
        >>> with split.applied_to(trunk):
        ...     z = trunk(torch.ones(1, 2))
        >>> torch.autograd.grad((2 * z).sum(), [split.outputs[0].edge])
        (tensor([[2., 2., 2.]]),)
    """

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.stops: dict[tuple[Node, int], int] = {}
        self.calls = 0
        self.head_outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def applied_to(self, trunk: nn.Module) -> Iterator[Split]:
        """Remember what every call of ``trunk`` inside the block returns; a scripted one takes no hook."""
        if isinstance(trunk, torch.jit.ScriptModule):
            yield self
            return
        handle = trunk.register_forward_hook(self._on_output)
        try:
            yield self
        finally:
            handle.remove()
        found: dict[tuple[Node, int], Output] = {}
        for output in self.outputs:
            # Where a head wrote in place, autograd has moved whatever reads this memory behind that write, and takes
            # the gradient of the value before it to the node that made the memory. Parts of one memory are one output.
            source, edge = output.written
            intact = times_written(output.z) == output.version
            now = output if intact else output._replace(z=source, edge=edge, below=edge)
            found.setdefault(now.key, now)
        self.outputs = list(found.values())
        self.stops = {key: index for index, key in enumerate(found)}

    @contextmanager
    def watching(self, heads: Mapping[str, nn.Module]) -> Iterator[None]:
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

    @property
    def clean(self) -> bool:
        """Whether a gradient sent into every z is all that passes the split.

        It is not where a head wrote in place, where a gradient hook on s acts on what all readers send together (one
        that retains the gradient, for instance), and where the trunk returned a parameter or a nested tensor.
        """
        return all(
            o.z.grad_fn is not None
            and times_written(o.z) == o.version
            and not (has_gradient_hooks(o.s) or o.z.is_nested)
            for o in self.outputs
        )

    # A trunk that is compiled in place would take its hooks along.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not say what it returns
    def _on_output(self, _trunk: nn.Module, _inputs: Any, output: Any) -> Any:  # noqa: ANN401
        self.calls += 1
        handed: dict[Tensor, Tensor] = {}  # a tensor that is returned twice stays one tensor
        return _replace_tensors(output, lambda z: handed[z] if z in handed else handed.setdefault(z, self._hand_out(z)))

    def _hand_out(self, z: Tensor) -> Tensor:
        """A view of an output; what has no gradient here, or no view, is handed on as it is."""
        plain = z.layout is torch.strided or z.is_nested
        if not (z.requires_grad and torch.is_grad_enabled() and plain) or is_functorch_wrapped(z):
            return z
        s = z.view_as(z)
        below = get_gradient_edge(z)
        owner = owner_of_memory(z)
        written = owner, get_gradient_edge(owner)
        self.outputs.append(Output(z, s, times_written(z), get_gradient_edge(s), below, written))
        return s


def _replace_tensors(data: Any, function: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Rebuild a nested structure with ``function`` of each tensor; opaque objects stay as they are."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, MutableMapping):
        new = copy.copy(data)
        for key, value in data.items():
            new[key] = _replace_tensors(value, function)
        return new
    if isinstance(data, list):
        copied = copy.copy(data)
        copied[:] = [_replace_tensors(value, function) for value in data]
        return copied
    if isinstance(data, tuple):
        values = [_replace_tensors(value, function) for value in data]
        # Without the class's own constructor, which may take anything; those of C, as of torch.max, have no other.
        return type(data)(values) if hasattr(data, "n_sequence_fields") else tuple.__new__(type(data), values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        rebuilt: Any = copy.copy(data)
        for name in (field.name for field in dataclasses.fields(data) if hasattr(data, field.name)):
            # As a frozen class sets them itself.
            object.__setattr__(rebuilt, name, _replace_tensors(getattr(data, name), function))
        return rebuilt
    return data
