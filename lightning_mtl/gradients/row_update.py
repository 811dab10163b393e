"""The update from the Jacobian's rows: heads once, trunk once a task, the direction written as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.feature_update import Wanted, gradients_from_cut
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.heads import check_reaches_trunk, differentiate_heads
from lightning_mtl.gradients.inject import inject
from lightning_mtl.gradients.micro_batch import Decide, Measured, MicroBatch, weighted_head_gradients
from lightning_mtl.gradients.rows import Rows


class RowUpdate:
    """Collects each task's gradient of the shared parameters over a window of micro-batches.

    Args:
        shared: The shared parameters that need gradients.
        tasks: All tasks of the module, in order.
        rows: A matrix of an earlier window to use again, if it fits.
    """

    def __init__(self, shared: Sequence[Tensor], tasks: Sequence[str], rows: Rows | None = None) -> None:
        self.shared = list(shared)
        self.rows = rows if rows is not None and rows.fits(self.shared, len(tasks)) else Rows(self.shared, len(tasks))
        self.rows.begin()
        self._order = {task: position for position, task in enumerate(tasks)}
        self._slots: dict[str, int] = {}
        self._own: list[dict[Tensor, Tensor]] = []
        self._penalty: dict[Tensor, Tensor] = {}

    def add(self, batch: MicroBatch, factors: Sequence[float], penalty_factor: float) -> None:
        """Differentiate one micro-batch; each task's gradients are multiplied by its factor before they are added."""
        losses = batch.losses if batch.penalty is None else [*batch.losses, batch.penalty]
        heads = differentiate_heads(losses, batch.cut)
        check_reaches_trunk(batch.names, heads)
        upstream = list(reached_leaves(batch.cut.outputs))
        needs_trunk = [index for index, head in enumerate(heads) if any(c is not None for c in head.cotangents)]
        for index, head in enumerate(heads):
            gradients = dict(head.parameters)
            if index in needs_trunk:
                found = gradients_from_cut(
                    batch.cut.outputs, head.cotangents, upstream, retain_graph=index != needs_trunk[-1]
                )
                for parameter, gradient in zip(upstream, found, strict=True):
                    if gradient is not None:
                        direct = gradients.get(parameter)
                        gradients[parameter] = gradient if direct is None else direct + gradient
            if index < len(batch.losses):
                self._add_task(batch.names[index], gradients, factors[index])
            else:
                _accumulate(self._penalty, gradients, penalty_factor)

    def scale(self, task: str, factor: float) -> None:
        """Multiply everything collected for a task."""
        slot = self._slots[task]
        self.rows.scale(slot, factor)
        self._own[slot] = {parameter: gradient * factor for parameter, gradient in self._own[slot].items()}

    @property
    def present(self) -> list[str]:
        """The tasks seen in the window, in the module's order."""
        return sorted(self._slots, key=self._order.__getitem__)

    def objective(self, value: Tensor, decide: Decide, *, wanted: Wanted, weighs_heads: bool) -> Tensor:
        """Build the scalar, equal to ``value``, whose backward pass writes the direction that ``decide`` chose."""
        slots = [self._slots[task] for task in self.present]
        decision = decide(self._measure(slots, wanted))
        own = [self._own[slot] for slot in slots]
        used = [self.shared[i] for i in self.rows.used]
        parameters = list(dict.fromkeys([*used, *(p for gradients in own for p in gradients), *self._penalty]))

        def gradients(outer: Tensor) -> list[Tensor]:
            if decision.directions is not None:
                pieces = self.rows.split([direction * outer for direction in decision.directions])
            else:
                weights = torch.zeros_like(decision.weights)
                weights[slots] = decision.weights * outer
                pieces = self.rows.combine(weights)
            total = {p: piece for p, piece in zip(self.shared, pieces, strict=True) if piece is not None}
            heads = weighted_head_gradients(own, decision.weights if weighs_heads else None, outer)
            for found in (heads, weighted_head_gradients([self._penalty], None, outer)):
                for parameter, gradient in found.items():
                    total[parameter] = total[parameter] + gradient if parameter in total else gradient
            return [total[parameter] for parameter in parameters]

        return inject(value, parameters, gradients)

    def _add_task(self, task: str, gradients: dict[Tensor, Tensor], factor: float) -> None:
        if task not in self._slots:
            self._slots[task] = len(self._slots)
            self._own.append({})
        slot = self._slots[task]
        self.rows.add(slot, [gradients.pop(parameter, None) for parameter in self.shared], factor)
        _accumulate(self._own[slot], gradients, factor)

    def _measure(self, slots: Sequence[int], wanted: Wanted) -> Measured:
        if wanted == "gramian":
            products = self.rows.gramian()[slots][:, slots]
            return Measured(gramian=products, norms=products.diagonal().sqrt())
        in_order = list(slots) == list(range(len(slots)))
        rows = [matrix if in_order else matrix[list(slots)] for matrix in self.rows.matrices()]
        return Measured(norms=self.rows.norms()[list(slots)], rows=rows if wanted == "rows" else ())


def _accumulate(total: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor], factor: float) -> None:
    for parameter, gradient in gradients.items():
        scaled = gradient if factor == 1.0 else gradient * factor
        total[parameter] = total[parameter] + scaled if parameter in total else scaled
