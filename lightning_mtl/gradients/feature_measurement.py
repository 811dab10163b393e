"""Per-task gradients are measured here at the trunk's outputs, or at one layer of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.gradients.compressed import Layer
from lightning_mtl.gradients.graph import Above, above_split, check_repeatable
from lightning_mtl.gradients.inner_products import Measured, Wanted, gramian
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.one_pass import EntersTrunkError, one_pass
from lightning_mtl.gradients.rows import Rows, as_real, by_parameter
from lightning_mtl.gradients.split import Output
from lightning_mtl.gradients.torch_internals import ACCUMULATE_GRAD, CAN_ASK_ENGINE, parameter_hooks_off
from lightning_mtl.gradients.trunk_gramian import layers_of

Cotangents = list[list[Tensor | None]]
"""dL_k/dz: for each task, one for each output of the trunk that is read."""


class FeatureMeasurement:
    r"""Differentiates each loss down to the trunk's outputs z: :math:`c_k = \partial L_k / \partial z`.

    Where no two losses share anything above z, and no pass from a loss enters the trunk by another way, one backward
    pass through all heads finds every c_k and the gradients of the heads' parameters with it: the short way. Elsewhere
    each c_k is measured by a pass of its own, when it is asked for.

    Args:
        batch: The losses, and the split with the trunk's outputs.
        parameters: Lists the shared parameters that need gradients, and all other trainable ones.
        losses: ``[K]``, the losses over all ranks, to report.
        may_be_short: Whether the short way may be taken at all.
        in_full: Whether a layer's gradients are computed themselves, not a short form of them.
    """

    def __init__(
        self,
        batch: MicroBatch,
        parameters: Callable[[], tuple[list[Tensor], list[Tensor]]],
        losses: Tensor,
        *,
        may_be_short: bool = True,
        in_full: bool = False,
    ) -> None:
        self.batch, self._parameters, self.losses, self._in_full = batch, parameters, losses, in_full
        above = [above_split(loss, batch.split.stops) for loss in batch.losses]
        self.read = outputs_read(batch, above)
        """The outputs of the trunk that losses read directly."""
        self._readers = [one.outputs for one in above]
        self._found: Cotangents | None = None
        self._own: list[dict[Tensor, Tensor]] = [{} for _ in above]
        self._rows: list[Tensor] = []
        self._reached_above = {leaf for one in above for leaf in one.leaves}
        self.short = False
        """Whether all is known down to the trunk's outputs, and every path to the trunk runs through them."""
        # Three looks that cost next to nothing; the fourth is the pass itself, which stops where it would be wrong.
        if may_be_short and CAN_ASK_ENGINE and batch.split.clean and _apart(batch, above):
            with parameter_hooks_off(leaf for one in above for leaf in one.leaves):
                self.short = self._take_short_way(above)

    def _take_short_way(self, above: Sequence[Above]) -> bool:
        nodes = [
            node
            for output in self.batch.split.outputs
            for node, _ in output.edge.node.next_functions
            if node is not None and type(node) is not ACCUMULATE_GRAD
        ]
        try:
            self._found, self._own = one_pass(self.batch, above, self.read, nodes)
        except EntersTrunkError:
            return False
        return True

    @property
    def _cotangents(self) -> Cotangents:
        """Known from the short way's pass; in the general way measured when they are first asked for."""
        if self._found is None:
            if self.batch.unseen:
                check_repeatable([loss for loss in self.batch.losses if loss.requires_grad])
            edges = [output.edge for output in self.read]
            tasks = range(len(self.batch.losses))
            self._found = [list(self.batch.gradients(index, edges, retain_graph=True)) for index in tasks]
        return self._found

    def groups(self) -> list[list[Tensor]]:
        """What heads read, for :func:`~lightning_mtl.gradients.layers.last_layer`."""
        return _groups(self.batch, self._readers)

    def measure(self, wanted: Wanted, layer: Sequence[Tensor] | None = None) -> Measured:
        """Measure at the trunk's outputs, over the samples of all ranks, or at the parameters of ``layer``."""
        if wanted == "nothing":
            return Measured()
        ranks, scale = self.batch.ranks, self.batch.scale
        if layer is not None:
            blocks, share = self._layer_blocks(layer, wanted), 1.0
            if ranks.size > 1:
                for block in blocks:
                    ranks.sum(block).div_(ranks.size)
        else:
            blocks, share = self._feature_rows(), 1 / ranks.size**2
        summed = ranks if layer is None else None
        if wanted == "gramian":
            return Measured.of_products(gramian(blocks, summed, share=share, scale=scale))
        return Measured.of_rows(blocks, summed, keeps=wanted == "rows", share=share, scale=scale)

    def _feature_rows(self) -> list[Tensor]:
        """The cotangents as ``[K, n]`` matrices, complex numbers as pairs of real ones."""
        if not self.read:
            check_outputs_read(self._reached_above, self._parameters()[0])
            return [torch.zeros(len(self._own), 1, device=self.losses.device)]
        self._rows = self._rows or feature_blocks(self.read, self._cotangents)
        return [as_real(block) for block in self._rows]

    def _layer_blocks(self, layer: Sequence[Tensor], wanted: Wanted) -> list[Tensor]:
        """What has the same inner products as the tasks' gradients of the layer: these themselves, or short forms.

        They come from the gradients at the trunk's outputs where those are enough.
        """
        if self.batch.unseen:
            check_repeatable([output.z for output in self.read] if self.short else self.batch.losses)
        with parameter_hooks_off(layer):
            if not self.short:
                return self._layer_rows(layer)
            # A layer lies below the outputs: what is known at the outputs leads there by one pass a task.
            short: list[Layer] = []
            # Short forms of different ranks do not add up.
            if not (wanted == "rows" or self._in_full or self.batch.ranks.size > 1):
                below = [p for p in layer if not any(p in own for own in self._own)]  # a layer may lie in a head
                short = layers_of([output.z for output in self.read], below, len(self._own))[0]
            in_short = {p for one in short for p in one.parameters}
            rest, edges = [p for p in layer if p not in in_short], [edge for one in short for edge in one.edges]
            rows, every = Rows(rest, len(self._own)), []
            for index, cotangents in enumerate(self._cotangents):
                known = dict(self._own[index])
                below = [p for p in rest if p not in known]
                found = self._passed_on(cotangents, [*below, *edges])
                rows.add(index, [(known | by_parameter(below, found[: len(below)])).get(p) for p in rest])
                every.append(iter(found[len(below) :]))
        return [
            *rows.matrices(),
            *(one.rows([list(itertools.islice(found, len(one.edges))) for found in every]) for one in short),
        ]

    def _passed_on(self, cotangents: Sequence[Tensor | None], inputs: Sequence[Any]) -> Sequence[Tensor | None]:
        """Differentiate by what lies below the trunk's outputs, from a task's gradients there."""
        pairs = [(o.z, c) for o, c in zip(self.read, cotangents, strict=True) if c is not None]
        if not pairs or not inputs:
            return [None] * len(inputs)
        outputs, given = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)

    def _layer_rows(self, layer: Sequence[Tensor]) -> list[Tensor]:
        """Each task's gradient of the layer, by a pass from its loss, which passes the trunk's outputs, too."""
        rows, edges = Rows(layer, len(self._own)), [output.edge for output in self.read]
        tasks = range(len(self._own))
        every = [self.batch.gradients(index, [*edges, *layer], retain_graph=True) for index in tasks]
        self._found = [list(found[: len(edges)]) for found in every]
        for index, found in enumerate(every):
            rows.add(index, found[len(edges) :])
        return rows.matrices()


def outputs_read(batch: MicroBatch, above: Sequence[Above]) -> list[Output]:
    """The trunk's outputs that losses read directly. What they read through another output is counted there."""
    return [batch.split.outputs[i] for i in sorted({i for one in above for i in one.outputs})]


def check_outputs_read(reached: Collection[Tensor], shared: Collection[Tensor]) -> None:
    """Refuse losses that read no output of the trunk, and reach its parameters all the same.

    Args:
        reached: The leaves that losses reach without passing an output.
        shared: The shared parameters.

    Raises:
        ValueError: Then; losses that reach no shared parameter at all have gradients of zero instead.
    """
    if not set(reached).isdisjoint(shared):
        raise ValueError(
            "No loss reads an output of the trunk that gradients could be measured at: the losses reach its parameters "
            "another way. A trunk called as trunk.forward(x), a scripted one, and one that returns an object of a "
            "class of its own show no outputs. Measure at 'trunk', or return tensors, or mappings, sequences or "
            "dataclasses of tensors."
        )


def feature_blocks(read: Sequence[Output], cotangents: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """The tasks' gradients at each output as a ``[K, n]`` matrix, complex where the output is.

    Numbers come in the order in which they lie in the output's memory: images may be ``channels_last``, and would have
    to be copied into another order, here and in the trunk's backward pass.

    Raises:
        ValueError: If an output is a nested tensor.
    """
    if any(output.z.is_nested for output in read):
        raise ValueError(
            "The trunk returns a nested tensor, and gradients at nested features have no inner products in torch. "
            "Measure at 'trunk' or 'last_layer'."
        )
    blocks = []
    for i, output in enumerate(read):
        zero = torch.zeros_like(output.z)
        found = [zero if (gradient := own[i]) is None else gradient for own in cotangents]
        order = _memory_order(output.z)
        blocks.append(torch.stack([gradient.permute(order) for gradient in found]).reshape(len(found), -1))
    return blocks


def as_output(flat: Tensor, z: Tensor) -> Tensor:
    """Give ``[n]`` numbers that lie in the order of :func:`feature_blocks` an output's shape, and its strides."""
    order = _memory_order(z)
    return flat.view([z.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(z.ndim)])


def _memory_order(z: Tensor) -> list[int]:
    """The dimensions from the one with the largest steps in memory to the one with the smallest."""
    return sorted(range(z.ndim), key=lambda dim: -z.stride()[dim])


def groups_read(batch: MicroBatch) -> list[list[Tensor]]:
    """What heads read, for :func:`~lightning_mtl.gradients.layers.last_layer`."""
    return _groups(batch, [above_split(loss, batch.split.stops).outputs for loss in batch.losses])


def _groups(batch: MicroBatch, readers: Sequence[frozenset[int]]) -> list[list[Tensor]]:
    """The trunk's outputs that heads read, a group where heads read others; the losses where there are none."""
    outputs = batch.split.outputs
    groups = {reader for reader in readers if reader} or {frozenset(range(len(outputs)))}
    return [[outputs[i].z for i in sorted(group)] for group in groups] if outputs else [batch.losses]


def _apart(batch: MicroBatch, above: Sequence[Above]) -> bool:
    """Whether no two losses share anything above the split, so that one pass tells the tasks apart."""
    leaves = [leaf for one in above for leaf in one.leaves]
    readers = [node for one in above for node in one.readers]
    stops = batch.split.stops
    return (
        len(set(leaves)) == len(leaves)
        and len(set(readers)) == len(readers)
        and not any(
            loss.requires_grad and (loss.grad_fn is None or (loss.grad_fn, loss.output_nr) in stops)
            for loss in batch.losses
        )
    )
