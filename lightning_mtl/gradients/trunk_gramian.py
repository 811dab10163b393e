"""What most methods read of the trunk's gradients is measured without keeping each task's in full."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.batched import all_at_once
from lightning_mtl.gradients.compressed import Convolution, Cotangents, Embedding, EmbeddingBag, Layer, Linear
from lightning_mtl.gradients.graph import check_nothing_hidden, check_repeatable
from lightning_mtl.gradients.inner_products import MadeBlocks, Measured, Wanted, gramian
from lightning_mtl.gradients.micro_batch import MicroBatch, surrogate
from lightning_mtl.gradients.rows import Rows, add_gradients, by_parameter, in_order, rows_for, weighted_sums
from lightning_mtl.gradients.torch_internals import ACCUMULATE_GRAD, CAST, TRANSPOSE, hooks_of, parameter_hooks_off

_logger = logging.getLogger(__name__)


class TrunkGramian:
    r"""Differentiates each loss as far as the outputs of the trunk's layers, and no further.

    .. math:: G_{ij} = \langle g_i, g_j \rangle, \qquad \theta\text{.grad} = \sum_k w_k g_k

    Of a layer that has a short form, see :class:`~lightning_mtl.gradients.compressed.Layer`, the tasks' gradients at
    its outputs are kept, and one gradient of its weights is computed, of their weighted sum. Of all other parameters,
    rows are kept. It takes the one micro-batch of a step on one process.

    Args:
        tasks: All tasks of the module, in order.
        shared: The shared parameters that need gradients.
        others: All other trainable parameters of the module.
        ranks: The processes that train together: this one alone, but see
            :class:`~lightning_mtl.gradients.gathered.GatheredGramian`.
        kept: The matrix of an earlier step to use again, if it fits, and the place to leave this step's in.
    """

    def __init__(
        self, tasks: Sequence[str], shared: Sequence[Tensor], others: Sequence[Tensor], ranks: Ranks, kept: list[Rows]
    ) -> None:
        self.shared, self.others, self.ranks = list(shared), list(others), ranks
        self.reached: set[Tensor] | None = None  # asked for where several ranks train
        self._num_tasks, self._kept = len(tasks), kept
        self._rows: Rows | None = None
        self._layers: list[tuple[Layer, list[list[Tensor | None]]]] = []  # each with its cotangents, by task and use
        self._own: list[dict[Tensor, Tensor]] = []

    @property
    def present(self) -> list[str]:
        """The tasks seen in the step."""
        return list(self._batch.names)

    def add(self, batch: MicroBatch, *, last: bool) -> None:
        """Differentiate the step's one micro-batch."""
        del last
        self._batch = batch
        graphs = [index for index, loss in enumerate(batch.losses) if loss.requires_grad]
        losses = [batch.losses[index] for index in graphs]
        if batch.unseen:
            check_repeatable(losses)
        layers, rest = self._sorted(losses)
        if batch.unseen:
            _logger.debug(
                "per-task gradients: %d layers measured without rows (%d parameters), rows of %d parameters",
                len(layers),
                sum(parameter.numel() for layer in layers for parameter in layer.parameters),
                sum(parameter.numel() for parameter in rest),
            )
        self._layers = [(layer, []) for layer in layers]
        edges = [edge for layer in layers for edge in layer.edges]
        if rest:
            self._rows = rows_for(self._kept, rest, self._num_tasks)
        parameters = [*rest, *self.others]
        inputs: list[Any] = [*parameters, *edges]
        with parameter_hooks_off(parameters) if any(map(hooks_of, parameters)) else nullcontext():
            size = sum(parameter.numel() for parameter in self.shared) if layers else 0
            every = all_at_once(batch, parameters, edges, size) if layers else None
            for index, loss in enumerate(batch.losses):
                found: Sequence[Tensor | None] = [None] * len(inputs) if every is None else every[index]
                if every is None and loss.requires_grad:
                    # The penalty's graph may be a part of the losses', and runs in the final backward pass.
                    retain = batch.penalty is not None or index != graphs[-1]
                    found = torch.autograd.grad(
                        loss, inputs, batch.starts[index], retain_graph=retain, allow_unused=True
                    )
                if self._rows is not None:
                    self._rows.add(index, found[: len(rest)])
                    if self.ranks.size > 1:
                        self._rows.begin_sum(index, self.ranks)
                self._own.append(by_parameter(self.others, found[len(rest) : len(parameters)]))
                begin = len(parameters)
                for layer, cotangents in self._layers:
                    cotangents.append(list(found[begin : begin + len(layer.edges)]))
                    begin += len(layer.edges)
        # All rows zero is possible, and is what a graph with hidden parameters looks like, too.
        if self.shared and not (self._rows is not None and self._rows.used) and not self._used_layers():
            check_nothing_hidden(batch.losses)

    def _sorted(self, losses: Sequence[Tensor]) -> tuple[list[Layer], list[Tensor]]:
        """The layers to compress, and the parameters to keep rows of."""
        layers, rest = layers_of(losses, self.shared, len(losses))
        return layers, rest if layers else self.shared

    def _used_layers(self) -> list[tuple[Layer, Cotangents]]:
        return [
            (layer, cotangents)
            for layer, cotangents in self._layers
            if any(gradient is not None for uses in cotangents for gradient in uses)
        ]

    def close(self, losses: Tensor, factors: Tensor | None) -> None:
        """Take the step's losses, ``[K]``, to report."""
        del factors
        self._losses = losses

    def measure(self, wanted: Wanted, layer: Sequence[Tensor] | None = None) -> Measured:
        """Measure at all shared parameters."""
        del layer  # a weighting that measures elsewhere is given another engine
        if wanted == "nothing" or not self._batch.names:
            return Measured()
        blocks: Sequence[Tensor] = [] if self._rows is None else self._rows.matrices()
        if self.ranks.size > 1:
            blocks = [self.ranks.part_of(rows) for rows in blocks]
        if made := self._compressed():
            blocks = MadeBlocks(blocks, made)
        # Where several ranks train, each takes a part of the columns, and the products add up.
        if wanted == "gramian":
            return Measured.of_products(gramian(blocks, self.ranks, scale=self._batch.scale))
        return Measured.of_rows(blocks, self.ranks, keeps=False, scale=self._batch.scale)

    def _compressed(self) -> list[Callable[[], Tensor]]:
        """What makes the layers' compressed rows."""
        return [functools.partial(layer.rows, cotangents) for layer, cotangents in self._layers]

    def surrogate_loss(
        self, weights: Tensor, head_weights: Tensor | None = None, directions: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Build the loss whose one backward pass gives shared parameters Σ w_k g_k, and all others Σ v_k g_k."""
        del directions  # of methods that read rows
        v = weights if head_weights is None else head_weights
        layers, scale = self._used_layers(), self._batch.scale
        parameters = [parameter for layer, _ in layers for parameter in layer.parameters]
        parameters += dict.fromkeys(parameter for own in self._own for parameter in own)
        if self._rows is not None:
            parameters += self._rows.used_parameters()
        if self.ranks.size > 1:  # a rank's backward pass has to reach what another's reaches
            parameters = [*self.shared, *self.others]

        def gradients(scaled: Tensor) -> list[Tensor]:
            outer = scaled if scale is None else scaled / scale
            total: dict[Tensor, Tensor] = {}
            if self._rows is not None and self._own:
                total = by_parameter(self._rows.parameters, self._rows.combine(weights * outer))
            # The final backward pass averages over the ranks: that leaves rows as they are, which are the same on all,
            # and makes a sum of what is this rank's share only after this factor.
            share = outer * self.ranks.size
            for layer, cotangents in layers:
                total.update(zip(layer.parameters, layer.combine(cotangents, weights * share), strict=True))
            add_gradients(total, weighted_sums(self._own, (v * share).unbind()))
            return in_order(total, parameters)

        loss = surrogate((self._losses * weights).sum(), parameters, gradients)
        penalty, self._batch.penalty = self._batch.penalty, None  # its graph need not outlive the backward pass
        return loss if penalty is None else loss + penalty


# What a node does with its input at a position, which has been transposed on the way or not, and which dimension of a
# weight is that of the outputs.
Key = tuple[str, int, bool]
_WEIGHTS: dict[Key, tuple[type[Layer], int]] = {
    ("AddmmBackward0", 2, True): (Linear, 0),
    ("AddmmBackward0", 2, False): (Linear, 1),
    ("MmBackward0", 1, True): (Linear, 0),
    ("MmBackward0", 1, False): (Linear, 1),
    ("ConvolutionBackward0", 1, False): (Convolution, 0),
    ("EmbeddingBackward0", 0, False): (Embedding, 1),
    ("EmbeddingBagBackward0", 0, False): (EmbeddingBag, 1),
}
_BIASES = {("AddmmBackward0", 0, False), ("ConvolutionBackward0", 2, False)}

Readers = dict[object, list[tuple[Node | None, int]]]
"""Who reads a leaf, or what is made of one on the way: a node and its input's position; None for a loss itself."""


def layers_of(
    losses: Sequence[Tensor], shared: Sequence[Tensor], num_tasks: int, *, every: bool = False
) -> tuple[list[Layer], list[Tensor]]:
    """Sort the parameters that losses reach into layers worth compressing, or every one, and all others.

    A parameter's gradient is the sum over the edges of the graph that lead to it. Those of a layer are all known ones,
    so that nothing is missed, whatever else happens in the graph.
    """
    readers = _readers(losses)
    rest: dict[Tensor, None] = {}
    weights: dict[frozenset[Node | None], tuple[Tensor, type[Layer], int]] = {}
    biases: dict[frozenset[Node | None], Tensor] = {}
    for parameter in shared:
        if parameter not in readers:
            continue
        rest[parameter] = None
        uses = _uses(parameter, readers)
        nodes = frozenset([node for node, _ in uses])
        if all(key in _BIASES for _, key in uses):
            biases[nodes] = parameter
        kinds = {_WEIGHTS.get(key) for _, key in uses}
        kind = kinds.pop()
        if kind is not None and not kinds and len(nodes) == len(uses):
            weights[nodes] = (parameter, *kind)
    layers = []
    for nodes, (weight, layer_type, dimension) in weights.items():
        operations = [node for node in nodes if node is not None]
        samples = samples_of(operations, weight.shape[dimension])
        if every or is_worth_it(weight, dimension, samples, num_tasks, factorizes=layer_type.factorizes):
            layer = layer_type(weight, biases.get(nodes), operations, dimension)
            if layer.is_known():
                layer.keep()
                layers.append(layer)
                for parameter in layer.parameters:
                    del rest[parameter]
    return layers, list(rest)


# What one number costs, in multiply-adds of a product of matrices: in a QR factorization of N samples, measured on one
# core, and guessed for GPUs, whose factorizations are slow; and to move it into a row and back into a direction.
_FACTORIZING: dict[str, Callable[[int], float]] = {
    "cpu": lambda samples: 1 + 36 / samples**0.5,
    "cuda": lambda _: 200.0,
}
_MOVING = 25.0
_LAYER = 3e6  # what a layer's short form takes in calls, at any size
_MARGIN = 1.05  # of what is not counted
_SPARSELY = 4.0  # rows of a table for each that is read, from which on these alone are moved faster than all


def is_worth_it(weight: Tensor, dimension: int, samples: int, num_tasks: int, *, factorizes: bool = True) -> bool:
    """Whether compressed rows take less memory and fewer operations than rows."""
    if not weight.numel() or weight.device.type not in _FACTORIZING:
        return False
    d_out = weight.shape[dimension]
    d_in = weight.numel() // d_out
    if not 0 < samples < d_in:
        return False
    if not factorizes:
        return _SPARSELY * samples < d_in
    factor = _FACTORIZING[weight.device.type](samples) * d_in * samples**2
    compressed = _LAYER + factor + samples * d_in * d_out + num_tasks * samples * d_out * (samples + num_tasks)
    rows = num_tasks * d_in * d_out * (samples + _MOVING + num_tasks)
    return bool(_MARGIN * compressed < rows)


def samples_of(nodes: Sequence[Node], d_out: int) -> int:
    """How many rows of ``d_out`` numbers the nodes' outputs are made of: for bags, those that they read."""
    if type(nodes[0]).__name__ == "EmbeddingBagBackward0":
        return sum(map(EmbeddingBag.reads, nodes))
    return int(sum(math.prod(node._input_metadata[0].shape) for node in nodes)) // max(1, d_out)


def _readers(losses: Sequence[Tensor]) -> Readers:
    """Walk the graph once, a microsecond a node."""
    readers: Readers = {}
    stack: list[Node] = []
    for loss in losses:
        if loss.grad_fn is not None:
            stack.append(loss.grad_fn)
        readers.setdefault(loss if loss.grad_fn is None else loss.grad_fn, []).append((None, 0))
    seen = set(stack)
    while stack:
        node = stack.pop()
        for position, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            kind = type(child)
            if kind is ACCUMULATE_GRAD:
                readers.setdefault(child.variable, []).append((node, position))  # type: ignore[attr-defined]
                continue
            if kind is TRANSPOSE or kind is CAST:
                readers.setdefault(child, []).append((node, position))
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return readers


def _uses(source: object, readers: Readers, *, transposed: bool = False) -> list[tuple[Node | None, Key]]:
    """The nodes that read a parameter, each with what a layer is known by."""
    found: list[tuple[Node | None, Key]] = []
    for node, position in readers[source]:
        if type(node) in (CAST, TRANSPOSE):
            found += _uses(node, readers, transposed=transposed ^ (type(node) is TRANSPOSE))
        else:
            found.append((node, (type(node).__name__, position, transposed)))
    return found
