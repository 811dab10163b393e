"""All tasks are passed backward through the trunk at once, where all that they share lies behind one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.torch_internals import ACCUMULATE_GRAD

# Operations whose backward formulas torch batches into kernels that are no slower than K single ones.
_BATCHED = {
    *("AddBackward0", "AddmmBackward0", "CatBackward0", "ClampBackward0", "CosBackward0", "DivBackward0"),
    *("EluBackward0", "ExpBackward0", "ExpandBackward0", "GeluBackward0", "HardswishBackward0", "LeakyReluBackward0"),
    *("MeanBackward1", "MmBackward0", "MulBackward0", "NativeLayerNormBackward0", "NegBackward0", "PermuteBackward0"),
    *("PowBackward0", "ReluBackward0", "ReshapeAliasBackward0", "SelectBackward0", "SigmoidBackward0", "SiluBackward0"),
    *("SinBackward0", "SliceBackward0", "SoftplusBackward0", "SplitBackward0", "SqueezeBackward0", "SubBackward0"),
    *("SumBackward1", "TBackward0", "TanhBackward0", "ToCopyBackward0", "TransposeBackward0", "UnsafeViewBackward0"),
    *("UnsqueezeBackward0", "ViewBackward0"),
}


@dataclass
class Funnel:
    """A tensor that every path from the losses to what they share runs through.

    Attributes:
        edge: Where its gradient arrives.
        readers: For each loss, the nodes that read it, each with its input's position.
        above: For each loss, the leaves that it reaches on other paths; no leaf has two losses.
        below: The leaves behind the tensor.
        nodes: The nodes behind the tensor, its own included.
    """

    edge: GradientEdge
    readers: list[list[tuple[Node, int]]]
    above: list[list[Tensor]]
    below: set[Tensor]
    nodes: set[Node]


def find_funnel(losses: Sequence[Tensor]) -> Funnel | None:
    """Look for the tensor; None if there is none, or if an operation behind it is not known to be batched well."""
    owner: dict[Node, int] = {}  # of each node the first loss that reaches it
    entries: set[tuple[Node, int]] = set()  # where another loss enters what has an owner
    for index, loss in enumerate(losses):
        root = loss.grad_fn
        if root is None or root in owner:
            return None
        entries |= _walk(root, index, owner)
    found = _behind(*entries) if len(entries) == 1 else None
    # A loss that is computed behind the tensor is no reader of it.
    if found is None or any(loss.grad_fn in found[0] for loss in losses):
        return None
    nodes, below = found
    [entry] = entries
    readers: list[list[tuple[Node, int]]] = [[] for _ in losses]
    above: list[dict[Tensor, None]] = [{} for _ in losses]
    for node, index in owner.items():
        for position, (child, number) in enumerate(() if node in nodes else node.next_functions):
            if child in nodes:
                if (child, number) != entry:
                    return None
                readers[index].append((node, position))
            elif child is not None and type(child) is ACCUMULATE_GRAD:
                above[index][child.variable] = None  # type: ignore[attr-defined]  # only this node type has it
    # The gradient of a leaf with several ways to it is a sum over them.
    if sum(map(len, above)) > len(set[Tensor]().union(*above) - below):
        return None
    return Funnel(GradientEdge(*entry), readers, [list(leaves) for leaves in above], below, nodes)


def _walk(root: Node, index: int, owner: dict[Node, int]) -> set[tuple[Node, int]]:
    """Take what nobody owns of a loss's graph; return where it enters what another one owns."""
    owner[root], stack = index, [root]
    entries = set()
    while stack:
        for child, number in stack.pop().next_functions:
            if child is None or type(child) is ACCUMULATE_GRAD:
                continue
            if child not in owner:
                owner[child] = index
                stack.append(child)
            elif owner[child] != index:
                entries.add((child, number))
    return entries


def _behind(entry: tuple[Node, int]) -> tuple[set[Node], set[Tensor]] | None:
    """The nodes and leaves that a node leads to; None if one of the nodes is not known to be batched well."""
    nodes, leaves, stack = {entry[0]}, set[Tensor](), [entry[0]]
    while stack:
        node = stack.pop()
        if type(node).__name__ not in _BATCHED:
            return None
        for child, _ in node.next_functions:
            if child is not None and type(child) is ACCUMULATE_GRAD:
                leaves.add(child.variable)  # type: ignore[attr-defined]
            elif child is not None and child not in nodes:
                nodes.add(child)
                stack.append(child)
    return nodes, leaves


def _fits(parameters: Sequence[Tensor], edges: Sequence[GradientEdge], limit: int) -> bool:
    """Whether no more than ``limit`` numbers a task are in memory at once."""
    outputs = [math.prod(edge.node._input_metadata[0].shape) for edge in edges]
    # Gradients of parameters are copied into rows, and the pass holds a few of a layer's inputs and outputs at a time.
    needed: int = 2 * sum(parameter.numel() for parameter in parameters) + sum(outputs) + 3 * max(outputs)
    return needed <= limit


def all_at_once(
    batch: MicroBatch, parameters: Sequence[Tensor], edges: Sequence[GradientEdge], limit: int
) -> list[list[Tensor | None]] | None:
    """Differentiate all losses in one pass above the tensor that they share, and one batched pass behind it.

    Args:
        batch: The losses.
        parameters: What to differentiate by, and after them:
        edges: the outputs of layers.
        limit: How many numbers a task there may be in all gradients behind the tensor.

    Returns:
        For each loss its gradients, None where it does not reach; or None if a pass for each loss is needed.
    """
    graphs = batch.with_graph
    funnel = find_funnel([batch.losses[index] for index in graphs]) if len(graphs) > 1 else None
    if funnel is None or not funnel.nodes.issuperset(edge.node for edge in edges):
        return None
    wanted = set(parameters)
    behind: list[Any] = [parameter for parameter in parameters if parameter in funnel.below]
    if not _fits(behind, edges, limit):
        return None
    above = [[leaf for leaf in leaves if leaf in wanted] for leaves in funnel.above]
    received: list[Tensor | None] = [None] * len(graphs)
    handles = [
        node.register_hook(_keeper(received, index, [place for reader, place in places if reader is node]))
        for index, places in enumerate(funnel.readers)
        for node in dict.fromkeys(node for node, _ in places)
    ]
    try:
        # A penalty's graph may be a part of the losses', and runs in the final backward pass.
        leaves = [leaf for own in above for leaf in own]
        _, *found = batch.all_gradients([funnel.edge, *leaves], retain_graph=batch.penalty is not None)
    finally:
        for handle in handles:
            handle.remove()
    by_leaf = dict(zip(leaves, found, strict=True))
    results: list[list[Tensor | None]] = [[None] * (len(parameters) + len(edges)) for _ in batch.losses]
    places = {parameter: place for place, parameter in enumerate(parameters)}
    for index, own in zip(graphs, above, strict=True):
        for leaf in own:
            results[index][places[leaf]] = by_leaf[leaf]
    positions = [places[parameter] for parameter in behind] + list(range(len(parameters), len(results[0])))
    tasks = [(index, gradient) for index, gradient in zip(graphs, received, strict=True) if gradient is not None]
    for (index, _), gradients in zip(tasks, _pass_on(funnel, [*behind, *edges], [g for _, g in tasks]), strict=True):
        for position, gradient in zip(positions, gradients, strict=True):
            results[index][position] = gradient
    return results


def _pass_on(funnel: Funnel, inputs: Sequence[Any], received: Sequence[Tensor]) -> list[Sequence[Tensor | None]]:
    """Pass the tasks' gradients on behind the tensor; for each task those of the inputs."""
    if not received:
        return []

    def gradients(cotangent: Tensor, *, batched: bool) -> Sequence[Tensor | None]:
        # The graph is kept until nobody holds the losses any more: what was freed could not be passed again.
        return torch.autograd.grad(
            [funnel.edge], inputs, [cotangent], retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        found = gradients(torch.stack(list(received)), batched=True)
    except RuntimeError:  # a hook on a hidden tensor does what cannot be batched
        return [gradients(cotangent, batched=False) for cotangent in received]
    unbound = [[None] * len(received) if gradient is None else gradient.unbind() for gradient in found]
    return list(zip(*unbound, strict=True))


def _keeper(received: list[Tensor | None], index: int, places: Sequence[int]) -> Callable[..., None]:
    """A hook that remembers what a node sends to the tensor."""

    def keep(gradients: tuple[Tensor | None, ...], _: Any) -> None:  # noqa: ANN401
        for place in places:
            if (gradient := gradients[place]) is not None:
                before = received[index]
                received[index] = gradient if before is None else before + gradient

    return keep
