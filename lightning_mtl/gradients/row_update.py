"""The update from the Jacobian's rows: heads once, trunk once a task, the direction written as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.compiled import check_repeatable
from lightning_mtl.gradients.feature_update import Wanted, gradients_from_cut, in_full_precision
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.heads import HeadPasses
from lightning_mtl.gradients.inject import inject
from lightning_mtl.gradients.micro_batch import (
    Decide,
    Measured,
    MicroBatch,
    add_gradients,
    measured_gramian,
    measured_norms,
    weighted_head_gradients,
)
from lightning_mtl.gradients.ranks import Ranks
from lightning_mtl.gradients.rows import Rows


class RowUpdate:
    """Collects each task's gradient of the shared parameters over a window of micro-batches.

    Args:
        shared: The shared parameters that need gradients.
        others: All other trainable parameters of the module, whose gradients the ranks average.
        tasks: All tasks of the module, in order.
        rows: A matrix of an earlier window to use again, if it fits.
    """

    def __init__(
        self, shared: Sequence[Tensor], others: Sequence[Tensor], tasks: Sequence[str], rows: Rows | None = None
    ) -> None:
        self.shared, self.others = list(shared), list(others)
        self.rows = rows if rows is not None and rows.fits(self.shared, len(tasks)) else Rows(self.shared, len(tasks))
        self.rows.begin()
        self._order = {task: position for position, task in enumerate(tasks)}
        self._slots: dict[str, int] = {}
        self._own: list[dict[Tensor, Tensor]] = []
        self._penalty: dict[Tensor, Tensor] = {}

    @property
    def present(self) -> list[str]:
        """The tasks seen in the window on any rank, in the module's order."""
        return sorted(self._slots, key=self._order.__getitem__)

    def add(self, batch: MicroBatch, penalty_factor: float, *, last: bool) -> None:
        """Differentiate one micro-batch; in the last one, each row travels while the next is computed."""
        heads = HeadPasses(batch)
        upstream = list(reached_leaves(batch.cut.outputs))
        needs_trunk = [index for index in range(len(heads)) if heads.reaches_trunk(index)]
        if len(needs_trunk) > 1:
            check_repeatable(batch.cut.outputs)
        for index in range(len(heads)):
            head = heads.one(index)  # one at a time, so that one task's gradient at the cut is held at once
            gradients = dict(head.parameters)
            if index in needs_trunk:
                # A penalty, which comes last, may come from inside the trunk.
                keeps = index != needs_trunk[-1] or (batch.penalty is not None and index < len(batch.names))
                found = gradients_from_cut(batch.cut.outputs, head.cotangents, upstream, retain_graph=keeps)
                reached = {p: g for p, g in zip(upstream, found, strict=True) if g is not None}
                add_gradients(gradients, reached, list(reached.values()))
            if index < len(batch.names):
                self._add_task(batch.names[index], gradients)
                if last and batch.ranks.size > 1:
                    self.rows.begin_sum(self._slots[batch.names[index]], batch.ranks)
            else:
                add_gradients(self._penalty, gradients, [g * penalty_factor for g in gradients.values()])
        if last and batch.ranks.size > 1:
            for task in self.present:
                if task not in batch.names:
                    self.rows.begin_sum(self._slots[task], batch.ranks)
            self.rows.end_sums(batch.ranks)

    def scale(self, task: str, factor: float) -> None:
        """Multiply everything collected for a task."""
        slot = self._slots[task]
        self.rows.scale(slot, factor)
        self._own[slot] = {parameter: gradient * factor for parameter, gradient in self._own[slot].items()}

    def objective(
        self, batch: MicroBatch, losses: Tensor, decide: Decide, *, wanted: Wanted, weighs_heads: bool
    ) -> Tensor:
        """Build the weighted loss whose backward pass writes the direction that ``decide`` chose.

        Args:
            batch: The window's last micro-batch.
            losses: ``[K]``, the window's losses of the present tasks.
            decide: Turns the measurements into weights or a direction.
            wanted: What to measure.
            weighs_heads: Whether each head's gradients are scaled by its task's weight, too.
        """
        slots = [self._slots[task] for task in self.present]
        measured = self._measure(slots, wanted, batch.scale)
        decision = decide(measured)
        weights = decision.for_heads(weighs_heads=weighs_heads)
        one = decision.weights.new_ones(())
        above = weighted_head_gradients([self._own[slot] for slot in slots], weights, one)
        add_gradients(above, self._penalty, list(self._penalty.values()))
        if batch.ranks.size > 1:
            # Only a penalty reaches shared parameters beside the rows.
            reached = self.others if batch.penalty is None else [*self.others, *self.shared]
            above = _sum_over_ranks(above, reached, batch.ranks)
        used = {self.shared[i]: i for i in self.rows.used}
        parameters = list(dict.fromkeys([*used, *above]))

        def gradients(scaled: Tensor) -> list[Tensor]:
            outer = batch.unscaled(scaled)
            if decision.directions is not None:
                pieces = self.rows.split([direction * outer for direction in decision.directions])
            else:
                in_slots = torch.zeros_like(decision.weights)
                in_slots[slots] = decision.weights * outer
                pieces = self.rows.combine(in_slots)
            total = {p: piece for p, piece in zip(self.shared, pieces, strict=True) if piece is not None}
            add_gradients(total, above, torch._foreach_mul(list(above.values()), outer) if above else [])
            return [total[parameter] for parameter in parameters]

        value = (losses * decision.weights).sum()
        if batch.penalty is not None:
            value = value + batch.penalty.detach()
        return inject(value, parameters, lambda outer: in_full_precision(gradients, outer))

    def _add_task(self, task: str, gradients: dict[Tensor, Tensor]) -> None:
        if task not in self._slots:
            self._slots[task] = len(self._slots)
            self._own.append({})
        slot = self._slots[task]
        self.rows.add(slot, [gradients.pop(parameter, None) for parameter in self.shared])
        add_gradients(self._own[slot], gradients, list(gradients.values()))

    def _measure(self, slots: Sequence[int], wanted: Wanted, scale: Tensor | None) -> Measured:
        if wanted == "gramian":
            return measured_gramian(self.rows.gramian()[slots][:, slots], scale)
        in_order = list(slots) == list(range(len(slots)))
        rows = [matrix if in_order else matrix[list(slots)] for matrix in self.rows.matrices()]
        return measured_norms(self.rows.norms()[list(slots)], scale, rows if wanted == "rows" else ())


def _sum_over_ranks(
    gradients: dict[Tensor, Tensor], parameters: Sequence[Tensor], ranks: Ranks
) -> dict[Tensor, Tensor]:
    """Sum the gradients of ``parameters`` in one collective a dtype; what no rank has stays without a gradient."""
    summed: dict[Tensor, Tensor] = {}
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        members = [parameter for parameter in parameters if parameter.dtype == dtype]
        flags = torch.tensor([float(p in gradients) for p in members], dtype=dtype, device=members[0].device)
        pieces = [gradients[p] if p in gradients else torch.zeros_like(p) for p in members]
        flat = ranks.sum(torch.cat([flags, *(piece.reshape(-1) for piece in pieces)]))
        found = flat[len(members) :].split([p.numel() for p in members])
        for parameter, flag, piece in zip(members, flat[: len(members)].tolist(), found, strict=True):
            if flag:
                summed[parameter] = piece.view_as(parameter)
    return summed
