"""Walks through a graph find what a loss depends on, and refuse what cannot be differentiated task by task."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from torch import Tensor
from torch.autograd.graph import Node

from lightning_mtl.gradients.torch_internals import (
    ACCUMULATE_GRAD,
    donates_buffers,
    forward_order,
    is_python_function,
    times_written,
)


def reached_leaves(roots: Iterable[Tensor]) -> dict[Tensor, int]:
    """Find the leaf tensors that ``roots`` depend on, each with the number of the last operation that read it.

    Operations are numbered in the order they ran, so the leaf with the highest number was used last in the forward
    pass. The walk visits every graph node once, about a microsecond each; no kernel runs.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> leaves = reached_leaves([(a.exp() * b).sum()])
        >>> leaves[b] > leaves[a]
        True
    """
    found: dict[Tensor, int] = {}
    seen: set[Node] = set()
    for root in roots:
        if root.grad_fn is None:
            if root.requires_grad:
                found.setdefault(root, -1)
        else:
            seen.add(root.grad_fn)
    stack = list(seen)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if type(child) is ACCUMULATE_GRAD:
                leaf = child.variable  # type: ignore[attr-defined]  # only this node type has it
                # A leaf that is read several times counts as last used where it was read last.
                found[leaf] = max(found.get(leaf, -1), forward_order(node))
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return found


def leaves_read_last(roots: Iterable[Tensor], among: Collection[Tensor]) -> set[Tensor]:
    """Find what the last of all operations reads that reads any of some leaves; empty if none does.

    The walk goes back in the order in which operations ran, and no further.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> leaves_read_last([(a.exp() * b).sum()], {a, b}) == {b}
        True
    """
    seen = {root.grad_fn for root in roots if root.grad_fn is not None}
    latest = [(-forward_order(node), place, node) for place, node in enumerate(seen)]
    heapify(latest)
    while latest:
        _, _, node = heappop(latest)
        found = set()
        for child, _ in node.next_functions:
            if child is not None and type(child) is ACCUMULATE_GRAD:
                found.add(child.variable)  # type: ignore[attr-defined]  # only this node type has it
            elif child is not None and child not in seen:
                seen.add(child)
                heappush(latest, (-forward_order(child), len(seen), child))
        if not found.isdisjoint(among):
            return found.intersection(among)
    return set()


def note_reach(
    roots: Mapping[int, Tensor], among: Collection[Tensor], owners: dict[Tensor, int], shared: set[Tensor]
) -> None:
    """Note the leaves that each task's loss depends on: the first task that does, and whether another does, too.

    The walk comes by a node twice at most: once a second task has been there, all leaves behind it are shared.

    Args:
        roots: Losses by the numbers of their tasks.
        among: The leaves that count; inputs that something is differentiated by do not.
        owners: The first task of each leaf; written to.
        shared: The leaves of two tasks or more; written to.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> owners, shared = {}, set()
        >>> note_reach({0: (a * b).sum(), 1: b.sum()}, {a, b}, owners, shared)
        >>> owners[a], owners[b], a in shared, b in shared
        (0, 0, False, True)
    """
    first: dict[Node, int] = {}
    twice: set[Node] = set()
    for task, root in roots.items():
        leaves: dict[Tensor, None] = {root: None} if root.grad_fn is None else {}
        stack: list[Node] = []
        found: Iterable[tuple[Node | None, int]] = [(root.grad_fn, 0)]
        while True:
            for node, _ in found:
                if node is None:
                    continue
                if type(node) is ACCUMULATE_GRAD:
                    leaves[node.variable] = None  # type: ignore[attr-defined]  # only this node type has it
                elif (visitor := first.get(node)) is None:
                    first[node] = task
                    stack.append(node)
                elif visitor != task and node not in twice:
                    twice.add(node)
                    stack.append(node)
            if not stack:
                break
            found = stack.pop().next_functions
        for leaf in leaves:
            if leaf in among and owners.setdefault(leaf, task) != task:
                shared.add(leaf)


@dataclass
class Above:
    """What a loss depends on between itself and the split.

    Attributes:
        leaves: The leaves reached without passing the split.
        readers: The operations that read an output of the trunk, each with (its input's position, the output's index).
    """

    leaves: list[Tensor] = field(default_factory=list)
    readers: dict[Node, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def outputs(self) -> frozenset[int]:
        """The trunk's outputs that are read, by index."""
        return frozenset(index for places in self.readers.values() for _, index in places)


def above_split(loss: Tensor, stops: Mapping[tuple[Node, int], int]) -> Above:
    """Walk from a loss toward the trunk and stop where it reads the trunk's outputs.

    Args:
        loss: A scalar with a graph.
        stops: The keys of the trunk's outputs, each with its index.
    """
    found, leaves = Above(), dict[Tensor, None]()
    start = loss.grad_fn
    if start is None:  # a constant, or a parameter as a loss
        found.leaves = [loss] if loss.requires_grad else []
        return found
    if (index := stops.get((start, loss.output_nr))) is not None:
        found.readers[start] = [(0, index)]
        return found
    # Depth first, each node once; a stop is a pair (node, output), for one node may have several outputs.
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for position, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            if (index := stops.get((child, number))) is not None:
                found.readers.setdefault(node, []).append((position, index))
            elif child not in seen:
                seen.add(child)
                if type(child) is not ACCUMULATE_GRAD:
                    stack.append(child)
                    continue
                leaves[child.variable] = None  # type: ignore[attr-defined]  # only this node type has it
    found.leaves = list(leaves)
    return found


def check_nothing_hidden(roots: Iterable[Tensor]) -> None:
    """Refuse a graph that shows no shared parameter, and holds an operation that may hide some.

    Raises:
        ValueError: If there is an ``autograd.Function`` written in Python: its backward may differentiate by parameters
            that it holds without having taken them as inputs.
    """
    for node in _nodes(roots):
        if is_python_function(node):
            raise ValueError(
                f"No loss reaches a shared parameter by a path of the graph, but {node.name()} is in it, and may hide "
                "parameters that its backward() differentiates by. Give them to it as inputs, or use a method that "
                "weighs by the losses alone."
            )


def check_repeatable(roots: Iterable[Tensor]) -> None:
    """Refuse a graph with a part that cannot be passed once for each task.

    Such are parts that were compiled for one backward pass alone, in an earlier training for instance, and reentrant
    checkpoints, whose parameters no path of the graph leads to.

    Raises:
        ValueError: Saying what to do instead.
    """
    for node in _nodes(roots):
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "A part of the model lies in a reentrant checkpoint, which hides its parameters from autograd until a "
                "whole backward pass runs. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or use a "
                "method that weighs by the losses alone."
            )
        if donates_buffers(node):
            raise ValueError(
                "A part of the model was compiled, before this training, for a single backward pass, but its tasks' "
                "gradients are computed one after another. Call torch.compiler.reset() before the training, so that it "
                "is compiled again."
            )


@contextmanager
def writing_no_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Refuse a graph in which something writes into gradients while they are measured.

    Raises:
        ValueError: If a parameter's gradient is another one after the block.
    """
    before = [(p, p.grad, None if p.grad is None else times_written(p.grad)) for p in parameters if p.requires_grad]
    yield
    for parameter, gradient, version in before:
        if parameter.grad is not gradient or (gradient is not None and times_written(gradient) != version):
            raise ValueError(
                f"A parameter of shape {list(parameter.shape)} got a gradient while the tasks' gradients were measured "
                "one after another: an autograd.Function in the model calls backward() in its own backward(), as "
                "reversible layers do. Have it return its gradients, from torch.autograd.grad, or use a method that "
                "weighs by the losses alone."
            )


def _nodes(roots: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of a graph."""
    seen: set[Node] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [child for child, _ in node.next_functions]
