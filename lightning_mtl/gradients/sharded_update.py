"""The updates where parameters are sharded over the ranks: every gradient of a parameter by a synchronised backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.gradients.compiled import check_repeatable
from lightning_mtl.gradients.feature_update import Wanted, combine, measure_features
from lightning_mtl.gradients.inject import inject
from lightning_mtl.gradients.inner_products import gramian
from lightning_mtl.gradients.micro_batch import Decide, Decision, Measured, MicroBatch, weighted_head_gradients
from lightning_mtl.gradients.rows import Rows


def sharded_feature_objective(
    batch: MicroBatch, losses: Tensor, decide: Decide, *, wanted: Wanted, weighs_heads: bool
) -> Tensor:
    """Build the scalar whose one backward pass applies the weights at the trunk's output.

    Sharding computes and averages a parameter's gradient in an ordinary backward pass only. So the heads are passed
    twice: once down to the cut, to measure, and once in the common backward pass, for their parameters.
    """
    num_tasks, outputs = len(batch.losses), batch.cut.outputs
    cotangents = _cotangents(batch)
    measured = measure_features(batch, cotangents[:num_tasks], outputs, wanted)
    decision = decide(measured)

    def gradients(outer: Tensor) -> list[Tensor]:
        if decision.directions is not None:
            down = [direction * outer for direction in decision.directions]
        else:
            down = combine(cotangents[:num_tasks], measured.rows, outputs, decision.weights * outer)
        for penalty in cotangents[num_tasks:]:
            for direction, cotangent in zip(down, penalty, strict=True):
                if cotangent is not None:
                    direction.add_((cotangent * outer).reshape(direction.shape))
        return [direction.view(z.shape) for direction, z in zip(down, outputs, strict=True)]

    zero = losses.new_zeros(())
    return _head_objective(batch, decision, weighs_heads=weighs_heads) + inject(zero, outputs, gradients)


class ShardedRowUpdate:
    """Collects this rank's shard of each task's gradient of the shared parameters over a window of micro-batches.

    Args:
        shared: The shared parameters that need gradients, sharded.
        others: All other trainable parameters.
        tasks: All tasks of the module, in order.
    """

    def __init__(self, shared: Sequence[Tensor], others: Sequence[Tensor], tasks: Sequence[str]) -> None:
        self.shared, self.others = list(shared), list(others)
        self.rows = Rows([_local(parameter) for parameter in self.shared], len(tasks))
        self._order = {task: position for position, task in enumerate(tasks)}
        self._slots: dict[str, int] = {}
        self._own: list[dict[Tensor, Tensor]] = []
        self._penalty: list[tuple[Tensor, Tensor]] = []

    @property
    def present(self) -> list[str]:
        """The tasks seen in the window on any rank, in the module's order."""
        return sorted(self._slots, key=self._order.__getitem__)

    def add(self, batch: MicroBatch, penalty_factor: float, *, last: bool) -> None:
        """Differentiate one micro-batch, one synchronised backward pass through the trunk a task."""
        del penalty_factor, last  # one micro-batch a step, whose penalty goes with the heads
        outputs, every_loss = batch.cut.outputs, _cotangents(batch)
        tasks, penalties = every_loss[: len(batch.names)], every_loss[len(batch.names) :]
        self._penalty = [
            (z, c) for penalty in penalties for z, c in zip(outputs, penalty, strict=True) if c is not None
        ]
        for name, cotangents in zip(batch.names, tasks, strict=True):
            pairs = [(z, c) for z, c in zip(outputs, cotangents, strict=True) if c is not None]
            torch.autograd.backward([z for z, _ in pairs], [c for _, c in pairs], retain_graph=True)
            self._slots[name] = len(self._slots)
            self.rows.add(self._slots[name], [None if p.grad is None else _local(p.grad) for p in self.shared])
            self._own.append({p: p.grad for p in self.others if p.grad is not None})
            for parameter in [*self.shared, *self.others]:
                parameter.grad = None

    def scale(self, task: str, factor: float) -> None:
        """Multiply everything collected for a task."""
        self.rows.scale(self._slots[task], factor)

    def objective(
        self, batch: MicroBatch, losses: Tensor, decide: Decide, *, wanted: Wanted, weighs_heads: bool
    ) -> Tensor:
        """Write the direction that ``decide`` chose, and build the scalar whose backward pass serves the heads."""
        slots = [self._slots[task] for task in self.present]
        products = gramian(self.rows.matrices(), batch.ranks)[slots][:, slots]
        decision = decide(Measured(products if wanted == "gramian" else None, products.diagonal().sqrt().to(losses)))
        weights = torch.zeros_like(decision.weights)
        weights[slots] = decision.weights
        above = [self._own[slot] for slot in slots]
        for parameter, gradient in weighted_head_gradients(
            above, decision.for_heads(weighs_heads=weighs_heads), losses.new_ones(())
        ).items():
            parameter.grad = gradient
        for parameter, direction in zip(self.shared, self.rows.combine(weights), strict=True):
            if direction is not None:
                parameter.grad = _like(direction, parameter)
        objective = _head_objective(batch, decision, weighs_heads=weighs_heads)
        if not self._penalty:
            return objective
        # What a penalty says of the trunk's output stops at the cut; it goes on from there, as beside features.
        at_cut = inject(
            losses.new_zeros(()), [z for z, _ in self._penalty], lambda outer: [c * outer for _, c in self._penalty]
        )
        return objective + at_cut


def _cotangents(batch: MicroBatch) -> list[list[Tensor | None]]:
    """dL_k/dz for each loss, and the penalty last; the graph is kept for the heads' parameters."""
    leaves = list(batch.cut.leaves)
    every_loss = batch.losses if batch.penalty is None else [*batch.losses, batch.penalty]
    check_repeatable([*every_loss, *batch.cut.outputs])
    found: list[list[Tensor | None]] = []
    for index, loss in enumerate(every_loss):
        seed = batch.seeds[index].to(loss) if batch.seeds is not None and index < len(batch.losses) else None
        cotangents: list[Tensor | None] = [None] * len(batch.cut.outputs)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, leaves, seed, retain_graph=True, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    before = cotangents[batch.cut.leaves[leaf]]
                    cotangents[batch.cut.leaves[leaf]] = gradient if before is None else before + gradient
        found.append(cotangents)
    return found


def _head_objective(batch: MicroBatch, decision: Decision, *, weighs_heads: bool) -> Tensor:
    weights = decision.for_heads(weighs_heads=weighs_heads)
    weights = torch.ones_like(decision.weights) if weights is None else weights
    weights = weights if batch.seeds is None else weights * batch.seeds
    losses = torch.stack([loss.to(weights) for loss in batch.losses]) if batch.losses else torch.zeros_like(weights)
    objective = (losses * weights).sum()
    return objective if batch.penalty is None else objective + batch.penalty


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(shard: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
