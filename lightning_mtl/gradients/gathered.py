"""Gramians without rows on several ranks: each sees the layers' inputs and output gradients of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.compressed import Embedding, Layer, compressed
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.rows import Rows, reached_anywhere
from lightning_mtl.gradients.trunk_gramian import TrunkGramian, is_worth_it, layers_of, samples_of


@dataclass
class _Part:
    """A layer that all ranks compress.

    Attributes:
        d_in: Its inputs, a bias's ones included.
        d_out: Its outputs.
        samples: N on each rank, 0 where no loss reaches it.
        dtype: Of what travels.
        own: What this rank has of it.
        place: Its position among this rank's layers.
    """

    d_in: int
    d_out: int
    samples: list[int]
    dtype: torch.dtype
    own: Layer | None
    place: int


class GatheredGramian(TrunkGramian):
    """The same on several ranks, whose samples are one batch.

    Inner products need the samples of all ranks: inputs and output gradients are gathered where these are fewer numbers
    than K rows. Weight gradients do not travel: each rank computes that of its own samples, and the final backward pass
    averages it as any gradient. Layers are chosen together, once a step, for a rank may lack a task.

    Args:
        tasks: All tasks of the module, in order.
        shared: The shared parameters that need gradients.
        others: All other trainable parameters of the module.
        ranks: The processes that train together.
        kept: As in :class:`~lightning_mtl.gradients.trunk_gramian.TrunkGramian`.
    """

    def __init__(
        self, tasks: Sequence[str], shared: Sequence[Tensor], others: Sequence[Tensor], ranks: Ranks, kept: list[Rows]
    ) -> None:
        super().__init__(tasks, shared, others, ranks, kept)
        self._parts: list[_Part] = []
        self._gathered: list[tuple[Tensor, list[Tensor | None]]] = []

    def _sorted(self, losses: Sequence[Tensor]) -> tuple[list[Layer], list[Tensor]]:
        num_tasks, n = len(self._batch.names), len(self.shared)
        found, others = layers_of(losses, self.shared, num_tasks, every=True)
        layers = {layer.weight: layer for layer in found if not isinstance(layer, Embedding)}
        position = {parameter: i for i, parameter in enumerate(self.shared)}
        # Of each parameter: who reaches it, who has it as a layer's weight, that layer's form and its square, which
        # tell whether all have the same one, and the samples of each rank.
        table = torch.zeros(n, 4 + self.ranks.size, dtype=torch.float64)
        for parameter in [*others, *(parameter for layer in found for parameter in layer.parameters)]:
            table[position[parameter], 0] = 1
        for weight, layer in layers.items():
            form = layer.dimension * (n + 1) + (0 if layer.bias is None else position[layer.bias] + 1)
            table[position[weight], 1:4] = torch.tensor([1.0, form, form**2])
            table[position[weight], 4 + self.ranks.rank] = samples_of(layer.nodes, layer.d_out)
        rows = self.ranks.sum(table.to(self.shared[0].device)).tolist()
        chosen: list[Layer] = []
        covered: set[Tensor] = set()
        for weight, (reach, have, form, square, *samples) in zip(self.shared, rows, strict=True):
            if not have or have != reach or have * square != form**2:
                continue
            dimension, bias = divmod(int(form / have), n + 1)
            own = layers.get(weight)
            part = _Part(
                weight.numel() // weight.shape[dimension] + (bias > 0),
                weight.shape[dimension],
                [int(number) for number in samples],
                torch.promote_types(weight.dtype, torch.float32),
                own,
                len(chosen),
            )
            if (bias and rows[bias - 1][0] != reach) or not self._travels_lightly(part, weight, dimension, num_tasks):
                continue
            self._parts.append(part)
            covered.update([weight, self.shared[bias - 1]] if bias else [weight])
            if own is not None:
                chosen.append(own)
        if not self._parts:
            return [], self.shared
        reached = [parameter for parameter, row in zip(self.shared, rows, strict=True) if row[0]]
        return chosen, [parameter for parameter in reached if parameter not in covered]

    def _travels_lightly(self, part: _Part, weight: Tensor, dimension: int, num_tasks: int) -> bool:
        """Whether compressing is worth it over all ranks, and gathering sends fewer numbers than rows."""
        if self._parts and self._parts[0].dtype != part.dtype:
            return False  # one tensor travels
        gathered = max(part.samples) * self.ranks.size * (part.d_in + num_tasks * part.d_out)
        fewer = gathered < num_tasks * part.d_in * part.d_out
        return fewer and is_worth_it(weight, dimension, sum(part.samples), num_tasks)

    def close(self, losses: Tensor, factors: Tensor | None) -> None:
        """Take the step's losses, ``[K]``, to report, and wait for what the other ranks have."""
        super().close(losses, factors)
        self._gather()
        if self._rows is not None:
            self._rows.end_sums()
        used = [parameter for layer, _ in self._used_layers() for parameter in layer.parameters]
        rows = [] if self._rows is None else self._rows.used_parameters()
        penalty = [] if self._batch.penalty is None else reached_leaves([self._batch.penalty])
        own = [parameter for gradients in self._own for parameter in gradients]
        self.reached = reached_anywhere(self.ranks, [*self.shared, *self.others], {*used, *rows, *penalty, *own})
        if self._rows is not None:
            # Where only another rank's tasks use a parameter, its column here is zero, and takes part all the same.
            self._rows.use(i for i, p in enumerate(self._rows.parameters) if p in self.reached)

    def _gather(self) -> None:
        """Gather inputs and output gradients, padded to the rank with the most samples, as one tensor."""
        if not self._parts:
            return
        num_tasks, packed = len(self._batch.names), []
        device = self.shared[0].device
        for part in self._parts:
            most, own = max(part.samples), part.samples[self.ranks.rank]
            inputs = torch.zeros(most, part.d_in, dtype=part.dtype, device=device)
            outputs = torch.zeros(num_tasks, most, part.d_out, dtype=part.dtype, device=device)
            if part.own is not None:
                inputs[:own] = part.own.inputs()
                for task, uses in enumerate(self._layers[part.place][1]):
                    if (gradient := part.own.outputs(uses)) is not None:
                        outputs[task, :own] = gradient
            packed += [inputs.flatten(), outputs.flatten()]
        sizes = [piece.numel() for piece in packed]
        pieces = [found.split(sizes) for found in self.ranks.gather(torch.cat(packed))]
        for index, part in enumerate(self._parts):
            inputs = torch.cat(
                [one[2 * index].view(-1, part.d_in)[:n] for one, n in zip(pieces, part.samples, strict=True)]
            )
            outputs = torch.cat(
                [
                    one[2 * index + 1].view(num_tasks, -1, part.d_out)[:, :n]
                    for one, n in zip(pieces, part.samples, strict=True)
                ],
                dim=1,
            )
            self._gathered.append((inputs, list(self.ranks.part_of(outputs).unbind())))

    def _compressed(self) -> list[Callable[[], Tensor]]:
        return [functools.partial(compressed, inputs, outputs) for inputs, outputs in self._gathered]
