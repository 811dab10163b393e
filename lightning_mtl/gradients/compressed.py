"""Layers whose per-task gradients have the same inner products in fewer numbers than the layer has weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import pad

from lightning_mtl.gradients.torch_internals import saved_input, saved_plainly

_Node = Any  # of the graph: each type of node has other attributes
_SUM, _MEAN = 0, 1  # an EmbeddingBag's modes
Cotangents = Sequence[Sequence[Tensor | None]]
"""For each task, its gradient at the output of each use of a layer; None where the task does not reach it."""


class Layer(ABC):
    r"""A weight, and perhaps a bias, with all uses of them in one step's graph.

    With the layer's inputs a, ``[N, d_in]`` over all its uses, and task k's gradient at its outputs G_k,
    ``[N, d_out]``, the task's weight gradient is G_kᵀ a. The factorization aᵀ = Q R has orthonormal columns in Q, so

    .. math:: \langle G_i^T a, G_j^T a \rangle = \langle R G_i, R G_j \rangle

    and where N < d_in, the ``[N, d_out]`` numbers of R G_k are fewer than the weights. They are as exact as the
    gradients themselves, unlike sums of (g_in · g_jm)(a_n · a_m), which square what cancels. A bias is one more input,
    of ones. No task needs a weight gradient; the step needs one, of Σ w_k G_k.

    Args:
        weight: The weight.
        bias: The bias, used wherever the weight is; None if there is none, or if it does not train.
        nodes: The nodes of the graph that use them.
        dimension: Which of the weight's dimensions is that of the outputs.
    """

    factorizes = True  # whether its short form takes a factorization of the inputs

    def __init__(self, weight: Tensor, bias: Tensor | None, nodes: Sequence[_Node], dimension: int = 0) -> None:
        self.weight, self.bias, self.nodes, self.dimension = weight, bias, list(nodes), dimension
        self.d_out = weight.shape[dimension]
        self.parameters = [weight] if bias is None else [weight, bias]
        self.edges = [GradientEdge(node, 0) for node in nodes]
        self._kept: list[Tensor] = []

    def is_known(self) -> bool:
        """Whether all nodes are such as this class describes, their inputs kept as they are."""
        weight, bias = self.weight, self.bias
        usual = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in self.parameters)
        if (
            not usual
            or not weight.numel()
            or not weight.is_floating_point()
            or (bias is not None and bias.shape != (self.d_out,))
        ):
            return False
        if not all(saved_plainly(node) and self._knows(node) for node in self.nodes):
            return False
        outputs = [node._input_metadata[0] for node in self.nodes]
        return all(o.device == weight.device and o.dtype.is_floating_point and not o.is_nested_tensor for o in outputs)

    def keep(self) -> None:
        """Take the inputs out of the graph, before it is freed."""
        self._kept = [saved_input(node) for node in self.nodes]

    @abstractmethod
    def _knows(self, node: _Node) -> bool: ...

    @abstractmethod
    def _inputs(self, node: _Node, kept: Tensor) -> Tensor:
        """The inputs of one use, ``[N, d_in]``."""

    def _outputs(self, node: _Node, gradient: Tensor) -> Tensor:
        """A gradient at the outputs of one use, ``[N, d_out]``."""
        del node
        return gradient

    @abstractmethod
    def _gradients(self, node: _Node, kept: Tensor, gradient: Tensor) -> list[Tensor]:
        """The gradients of weight and bias that one use makes of the gradient at its outputs."""

    def inputs(self) -> Tensor:
        """The inputs of all uses, ``[N, d_in]``, with a column of ones for a bias."""
        a = _joined([_wide(self._inputs(node, kept)) for node, kept in zip(self.nodes, self._kept, strict=True)])
        return a if self.bias is None else torch.cat([a, a.new_ones(len(a), 1)], dim=1)

    def outputs(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """A task's gradients at the outputs of all uses, ``[N, d_out]``; None if it reaches none of them."""
        if all(gradient is None for gradient in gradients):
            return None
        pieces = []
        for node, gradient in zip(self.nodes, gradients, strict=True):
            shape = node._input_metadata[0].shape
            pieces.append(_wide(self._outputs(node, self.weight.new_zeros(shape) if gradient is None else gradient)))
        return _joined(pieces)

    def rows(self, cotangents: Cotangents) -> Tensor:
        """The tasks' gradients, compressed, ``[K, n]``."""
        return compressed(self.inputs(), [self.outputs(uses) for uses in cotangents])

    def combine(self, cotangents: Cotangents, weights: Tensor) -> list[Tensor]:
        """The gradients of weight and bias in the sum of all tasks, each times its weight."""
        total: list[Tensor] = []
        for node, kept, *gradients in zip(self.nodes, self._kept, *cotangents, strict=True):
            mixed = _mix(gradients, weights)
            if mixed is not None:
                found = self._gradients(node, kept, mixed)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return [found.to(parameter) for found, parameter in zip(total, self.parameters, strict=True)]


class Linear(Layer):
    """``[N, d_in] @ [d_in, d_out]``, with or without a bias: what linear layers of any leading dimensions become."""

    def _knows(self, node: _Node) -> bool:
        return getattr(node, "_saved_alpha", 1) == 1 and getattr(node, "_saved_beta", 1) == 1

    def _inputs(self, node: _Node, kept: Tensor) -> Tensor:
        return kept

    def _gradients(self, node: _Node, kept: Tensor, gradient: Tensor) -> list[Tensor]:
        a = kept.to(gradient)
        weight = a.T @ gradient if self.dimension else gradient.T @ a
        return [weight] if self.bias is None else [weight, gradient.sum(0)]


class Convolution(Layer):
    """A convolution of any number of dimensions, in one group: a linear layer at every position of its output."""

    def _knows(self, node: _Node) -> bool:
        return not node._saved_transposed and node._saved_groups == 1

    def _inputs(self, node: _Node, kept: Tensor) -> Tensor:
        x = pad(kept, [side for size in reversed(node._saved_padding) for side in (size, size)])
        positions, window = node._input_metadata[0].shape[2:], self.weight.shape[2:]
        sample, channel, *steps = x.stride()
        strides = [step * by for step, by in zip(steps, node._saved_stride, strict=True)]
        spread = [step * by for step, by in zip(steps, node._saved_dilation, strict=True)]
        # What the window sees at each position, without a copy yet.
        seen = x.as_strided(
            (len(x), *positions, x.shape[1], *window), (sample, *strides, channel, *spread), x.storage_offset()
        )
        return seen.reshape(len(x) * math.prod(positions), -1)

    def _outputs(self, node: _Node, gradient: Tensor) -> Tensor:
        return gradient.movedim(1, -1).reshape(-1, self.d_out)

    def _gradients(self, node: _Node, kept: Tensor, gradient: Tensor) -> list[Tensor]:
        _, weight, bias = torch.ops.aten.convolution_backward(
            gradient,
            kept.to(gradient),
            self.weight.detach().to(gradient),
            None if self.bias is None else [self.d_out],
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            False,
            node._saved_output_padding,
            1,
            [False, True, self.bias is not None],
        )
        return [weight] if self.bias is None else [weight, bias]


class Embedding(Layer):
    """A table of which a step reads few rows: their gradients alone are kept, and no factorization is needed."""

    factorizes = False

    def _knows(self, node: _Node) -> bool:
        return not node._saved_scale_grad_by_freq

    def _inputs(self, node: _Node, kept: Tensor) -> Tensor:
        return kept.flatten()

    def _outputs(self, node: _Node, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, self.d_out)

    def rows(self, cotangents: Cotangents) -> Tensor:
        """The tasks' gradients at the rows that were read, ``[K, n]``."""
        indices = [kept.flatten() for kept in self._kept]
        read, places = torch.cat(indices).unique(return_inverse=True)
        pieces = places.split([len(index) for index in indices])
        rows = _wide(self.weight.detach()).new_zeros(len(cotangents), len(read), self.d_out)
        for task, uses in enumerate(cotangents):
            for node, index, piece, gradient in zip(self.nodes, indices, pieces, uses, strict=True):
                if gradient is not None:
                    counts = (index != self._padding(node))[:, None]
                    rows[task].index_add_(0, piece, _wide(self._outputs(node, gradient)).where(counts, 0.0))
        return rows.flatten(1)

    def _padding(self, node: _Node) -> int:
        """The row without a gradient; -1 for none, which the node keeps as an unsigned number."""
        index: int = node._saved_padding_idx
        return index if index < len(self.weight) else -1

    def _gradients(self, node: _Node, kept: Tensor, gradient: Tensor) -> list[Tensor]:
        table = len(self.weight), self._padding(node)
        return [torch.ops.aten.embedding_backward(gradient, kept, *table, False, node._saved_sparse)]


class EmbeddingBag(Embedding):
    """Sums or means of a table's rows: a table whose reads get their bag's gradient, each times its weight."""

    @staticmethod
    def reads(node: _Node) -> int:
        """How many rows one use has read, without a call of the hooks that keep them; 0 where there are some."""
        return int(node._raw_saved_indices.data.numel()) if saved_plainly(node) else 0

    def _knows(self, node: _Node) -> bool:
        return node._saved_mode in (_SUM, _MEAN) and super()._knows(node)

    def keep(self) -> None:
        """Take the inputs out of the graph, and each read's bag and weight."""
        super().keep()
        self._reads = {node: self._read(node, kept) for node, kept in zip(self.nodes, self._kept, strict=True)}

    def _read(self, node: _Node, indices: Tensor) -> tuple[Tensor, Tensor]:
        num_bags = node._input_metadata[0].shape[0]
        places = torch.arange(len(indices), device=indices.device)
        bags = torch.searchsorted(node._saved_offsets[:num_bags].to(places), places, right=True) - 1
        if node._saved_mode == _SUM:
            given = node._saved_per_sample_weights
            return bags, torch.ones_like(indices) if given is None else given.detach()
        counts = (indices != self._padding(node)).to(torch.promote_types(self.weight.dtype, torch.float32))
        return bags, counts.new_zeros(num_bags).index_add_(0, bags, counts).clamp(min=1).reciprocal()[bags]

    def _outputs(self, node: _Node, gradient: Tensor) -> Tensor:
        bags, factors = self._reads[node]
        return _wide(gradient)[bags] * factors[:, None]

    def _gradients(self, node: _Node, kept: Tensor, gradient: Tensor) -> list[Tensor]:
        return super()._gradients(node, kept, self._outputs(node, gradient))


def compressed(inputs: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
    """For each task R G_k, flat, as :class:`Layer` has it; zeros where there is no gradient."""
    factor: Tensor = torch.linalg.qr(inputs.T, mode="r").R
    d_out = max((gradient.shape[1] for gradient in outputs if gradient is not None), default=0)
    rows = factor.new_zeros(len(outputs), len(factor), d_out)
    for row, gradient in enumerate(outputs):
        if gradient is not None:
            torch.mm(factor, gradient.to(factor), out=rows[row])
    return rows.flatten(1)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _wide(tensor: Tensor) -> Tensor:
    """The same numbers in float32 at least, which factorizations need and sums deserve."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mix(gradients: Sequence[Tensor | None], weights: Tensor) -> Tensor | None:
    """The sum of the gradients that there are, each times its weight; None if there are none."""
    total: Tensor | None = None
    for gradient, weight in zip(gradients, weights.unbind(), strict=True):
        if gradient is not None:
            part = _wide(gradient)
            total = part * weight.to(part) if total is None else total.addcmul_(part, weight.to(part))
    return total
