"""Each task's gradient of all parameters is kept here over one optimizer step: the Jacobian's rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.devices import numbers
from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.feature_measurement import check_outputs_read, feature_blocks, outputs_read
from lightning_mtl.gradients.graph import above_split, check_nothing_hidden, check_repeatable, reached_leaves
from lightning_mtl.gradients.inner_products import Measured, Wanted, gramian, unscaled_products
from lightning_mtl.gradients.micro_batch import MicroBatch, surrogate
from lightning_mtl.gradients.rows import (
    Rows,
    add_gradients,
    as_real,
    by_parameter,
    in_order,
    reached_anywhere,
    rows_for,
    weighted_sums,
)
from lightning_mtl.gradients.torch_internals import hooks_of, parameter_hooks_off


class TrunkGradients:
    r"""Differentiates each loss by all parameters and keeps the gradients until the weights are known.

    .. math:: g_k = \nabla_\theta L_k, \qquad \theta\text{.grad} = \sum_k w_k g_k

    Several micro-batches add up, in whichever of them a task takes part, so that a weighting is asked once about all
    tasks of the step. Nothing but parameters is differentiated by, so no path of the graph is missed.

    Args:
        tasks: All tasks of the module, in order.
        shared: The shared parameters that need gradients.
        others: All other trainable parameters of the module.
        ranks: The processes that train together. Rows are summed over them; the others' gradients stay this rank's,
            for the final backward pass averages them as it averages any gradient.
        kept: The matrix of an earlier step to use again, if it fits, and the place to leave this step's in.
        features: Whether the products of the gradients at the trunk's outputs are needed, too.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        ranks: Ranks,
        *,
        kept: list[Rows] | None = None,
        features: bool = False,
    ) -> None:
        self.shared, self.others, self.ranks = list(shared), list(others), ranks
        self.rows = rows_for([] if kept is None else kept, self.shared, len(tasks))
        self._tasks = tuple(tasks)
        self._slots: dict[str, int] = {}
        self._own: list[dict[Tensor, Tensor]] = []
        self._penalty: dict[Tensor, Tensor] = {}  # of micro-batches before the last
        self._products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64) if features else None
        self._losses = torch.zeros(0)
        # Of the newest micro-batch: its tasks, the penalty that its backward pass is left with, a scaler's factor.
        self._newest: Sequence[str] = ()
        self._open_penalty: Tensor | None = None
        self._scale: Tensor | None = None
        self.present: list[str] = []
        """The tasks seen in the step on any rank, in the module's order."""
        self.reached: set[Tensor] | None = None
        """The parameters that any rank's losses and penalties reach, where several ranks train."""

    def share(self, shared: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Go on with more shared parameters, where a later micro-batch shows that tasks share them."""
        if len(shared) == len(self.shared):
            return
        before = [self.rows.split([matrix[slot] for matrix in self.rows.matrices()]) for slot in range(len(self._own))]
        rows = Rows(shared, len(self._tasks))
        for slot, (pieces, own) in enumerate(zip(before, self._own, strict=True)):
            known = by_parameter(self.shared, pieces)
            known.update((parameter, own.pop(parameter)) for parameter in shared if parameter in own)
            rows.add(slot, [known.get(parameter) for parameter in shared])
        self.rows, self.shared, self.others = rows, list(shared), list(others)

    def add(self, batch: MicroBatch, *, last: bool) -> None:
        """Differentiate one micro-batch; in the last one, each row travels while the next is computed."""
        self._newest, self._open_penalty, self._scale = batch.names, batch.penalty, batch.scale
        parameters = [*self.shared, *self.others]
        # The walks above the split are needed only where features are measured while gradients are collected.
        above = [] if self._products is None else [above_split(loss, batch.split.stops) for loss in batch.losses]
        read = outputs_read(batch, above) if above else []
        if self._products is not None and not read:
            check_outputs_read([leaf for one in above for leaf in one.leaves], self.shared)
        edges = [output.edge for output in read]
        inputs: list[Any] = [*parameters, *edges]
        graphs = [index for index, loss in enumerate(batch.losses) if loss.requires_grad]
        if batch.unseen:
            check_repeatable([loss for loss in batch.losses if loss.requires_grad])
        slots = [self._slot(task) for task in batch.names]
        cotangents: list[Sequence[Tensor | None]] = []
        with parameter_hooks_off(parameters) if any(map(hooks_of, parameters)) else nullcontext():
            for index, (slot, loss) in enumerate(zip(slots, batch.losses, strict=True)):
                found: Sequence[Tensor | None] = [None] * len(inputs)
                if loss.requires_grad:
                    # The penalty's graph may be a part of the losses', and runs in the final backward pass.
                    retain = batch.penalty is not None or index != graphs[-1]
                    found = torch.autograd.grad(
                        loss, inputs, batch.starts[index], retain_graph=retain, allow_unused=True
                    )
                # Shared gradients become a row at once, so that never more than one task's gradients exist twice.
                self.rows.add(slot, found[: len(self.shared)])
                add_gradients(self._own[slot], by_parameter(self.others, found[len(self.shared) : len(parameters)]))
                cotangents.append(found[len(parameters) :])
                if last and self.ranks.size > 1:
                    self.rows.begin_sum(slot, self.ranks)
            # The last micro-batch's penalty is differentiated by the step's own backward pass; earlier ones have none.
            if not last and batch.penalty is not None and batch.penalty.requires_grad:
                seed = None if batch.scale is None else batch.scale.to(batch.penalty.dtype)
                own = torch.autograd.grad(batch.penalty, parameters, seed, allow_unused=True)
                add_gradients(self._penalty, by_parameter(parameters, own))
        # All rows zero is possible, and is what a graph with hidden parameters looks like, too.
        if self.shared and not self.rows.used:
            check_nothing_hidden(batch.losses)
        if self._products is not None and edges:
            self._add_products(batch, feature_blocks(read, cotangents))

    def _slot(self, task: str) -> int:
        """The row of a task; rows are given in the order in which tasks first come."""
        if task not in self._slots:
            self._slots[task] = len(self._own)
            self._own.append({})
            self.present = [task for task in self._tasks if task in self._slots]
        return self._slots[task]

    def _add_products(self, batch: MicroBatch, blocks: Sequence[Tensor]) -> None:
        """Add the Gramian of one micro-batch's features: those of different samples are orthogonal to each other."""
        if self._products is None:
            return
        at = torch.tensor([self._tasks.index(task) for task in batch.names])
        self._products[at[:, None], at] += gramian([as_real(block) for block in blocks])

    def close(self, losses: Tensor, factors: Tensor | None) -> None:
        """End the step's micro-batches.

        Args:
            losses: ``[K]``, the step's losses of the present tasks, to report.
            factors: ``[K]``, what the sum of a task's gradients is multiplied by; None for 1.
        """
        self._losses = losses
        if self.ranks.size > 1:
            for task in self.present:
                if task not in self._newest:
                    self.rows.begin_sum(self._slots[task], self.ranks)
            self.rows.end_sums()
            self._agree_on_reached()
        if factors is None:
            return
        for task, factor in zip(self.present, factors.unbind(), strict=True):
            slot = self._slots[task]
            self.rows.scale(slot, factor)
            self._own[slot] = weighted_sums([self._own[slot]], [factor])
        if self._products is not None:
            at = torch.tensor([self._tasks.index(task) for task in self.present])
            both = factors.cpu().double()
            self._products[at[:, None], at] *= both[:, None] * both

    def _agree_on_reached(self) -> None:
        parameters = [*self.shared, *self.others]
        reached = {self.shared[i] for i in self.rows.used}.union(self._penalty, *self._own)
        if self._open_penalty is not None:
            reached.update(reached_leaves([self._open_penalty]))
        self.reached = reached_anywhere(self.ranks, parameters, reached)
        # Where only another rank's tasks use a parameter, its column here is zero and has to take part all the same.
        self.rows.use(i for i, p in enumerate(self.shared) if p in self.reached)

    def measure(self, wanted: Wanted, layer: Sequence[Tensor] | None = None) -> Measured:
        """Measure at all shared parameters, at the trunk's outputs, or at the parameters of ``layer``."""
        scale = self._scale
        if wanted == "nothing" or not self.present:
            return Measured()
        slots = [self._slots[task] for task in self.present]
        if self._products is not None:
            # Each rank has the products of its own samples, and those of different samples are orthogonal: they add up.
            at = torch.tensor([self._tasks.index(task) for task in self.present])
            products = self._products[at[:, None], at]
            if self.ranks.size > 1:  # which sum where their losses lie
                products = self.ranks.sum(products.to(self._losses.device)).cpu()
            return Measured.of_products(unscaled_products(products, scale), norms_only=wanted == "norms")
        blocks = self.rows.matrices() if layer is None else self._blocks_of(layer)
        if wanted == "gramian":
            return Measured.of_products(gramian(blocks, scale=scale)[slots][:, slots])
        measured = Measured.of_rows(blocks, keeps=wanted == "rows", scale=scale)
        # Rows lie in the order in which tasks came; methods read them in the module's. Most steps have one order.
        return measured if slots == list(range(len(slots))) else measured.in_order(slots)

    def _blocks_of(self, layer: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of some parameters, ``[K, n]``; those outside of the trunk are not summed over ranks yet."""
        inside = [i for i, p in enumerate(self.shared) if any(p is q for q in layer)]
        # What is measured for the trunk already serves a layer inside of it: no second pass.
        blocks = self.rows.columns(inside)
        outside = [p for p in layer if not any(p is q for q in self.shared)]
        if outside:
            rows = Rows(outside, len(self._own))
            for slot, own in enumerate(self._own):
                rows.add(slot, [own.get(p) for p in outside])
            rows.sum_over(self.ranks)
            blocks += rows.matrices()
        return blocks

    def surrogate_loss(
        self, weights: Tensor, head_weights: Tensor | None = None, directions: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Build the loss whose one backward pass gives shared parameters Σ w_k g_k, and all others Σ v_k g_k.

        Args:
            weights: ``[K]``, w, for the present tasks.
            head_weights: ``[K]``, v; None for w.
            directions: What the shared parameters get instead, one ``[n]`` tensor for each matrix of rows.
        """
        v = weights if head_weights is None else head_weights
        slots = [self._slots[task] for task in self.present]
        own = [self._own[slot] for slot in slots]
        scale, others = self._scale, [p for one in (*own, self._penalty) for p in one]
        parameters = list(dict.fromkeys([*self.rows.used_parameters(), *others]))
        if self.ranks.size > 1:  # a rank's backward pass has to reach what another's reaches
            parameters = [*self.shared, *self.others]

        def gradients(scaled: Tensor) -> list[Tensor]:
            outer = scaled if scale is None else scaled / scale
            if directions is not None:
                pieces = self.rows.split([direction * outer.to(direction.device) for direction in directions])
            elif slots:
                in_slots = weights * outer
                if slots != list(range(len(slots))):
                    order = sorted(range(len(slots)), key=slots.__getitem__)
                    in_slots = in_slots[numbers(order, in_slots.device)]
                pieces = self.rows.combine(in_slots)
            else:
                pieces = [None] * len(self.shared)
            total = by_parameter(self.shared, pieces)
            # The final backward pass averages over the ranks: that leaves the rows, which are the same on all, as they
            # are, and makes a sum of what is this rank's share only after this factor.
            add_gradients(total, weighted_sums(own, (v * (outer * self.ranks.size)).unbind()))
            add_gradients(total, weighted_sums([self._penalty], [outer]))
            return in_order(total, parameters)

        loss = surrogate((self._losses * weights).sum(), parameters, gradients)
        penalty, self._open_penalty = self._open_penalty, None  # its graph need not outlive the backward pass
        return loss if penalty is None else loss + penalty
