"""Where parameters are sharded over the ranks, every gradient of one comes from an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mtl.gradients.features import FeatureGradients
from lightning_mtl.gradients.graph import check_repeatable
from lightning_mtl.gradients.inner_products import Measured, Wanted, gramian
from lightning_mtl.gradients.micro_batch import MicroBatch, surrogate
from lightning_mtl.gradients.rows import Rows, weighted_sums


class ShardedFeatureGradients(FeatureGradients):
    """Per-task gradients at the trunk's outputs of a sharded model.

    Sharding computes and averages a parameter's gradient in an ordinary backward pass only. So the heads are passed
    twice: once down to the trunk's outputs, to measure, and once in the final backward pass, for their parameters.
    """

    def __init__(self, batch: MicroBatch, losses: Tensor) -> None:
        super().__init__(batch, lambda: ([], []), losses, may_be_short=False)

    def _by_parameters(self, weights: Tensor, v: Tensor) -> Tensor:
        raise ValueError(
            "A loss reaches the trunk of a sharded model (FSDP2) by a way other than the trunk's output, or a head "
            "writes into that output, so trunk and heads cannot have weights of their own. Measure at 'trunk', use a "
            "method that weighs heads as the trunk, or train with strategy='ddp'."
        )


class ShardedTrunkGradients:
    """Each task's gradient of the shared parameters as this rank's shard, by one synchronized backward pass a task.

    Args:
        tasks: All tasks of the module, in order.
        shared: The shared parameters that need gradients, sharded.
        others: All other trainable parameters.
    """

    def __init__(self, tasks: Sequence[str], shared: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.shared, self.others = list(shared), list(others)
        self.rows = Rows([_local(parameter) for parameter in self.shared], len(tasks))
        self._own: list[dict[Tensor, Tensor]] = []
        self.reached: set[Tensor] | None = None  # not known: sharded parameters have no gradients to ask

    @property
    def present(self) -> list[str]:
        """The tasks seen in the step on any rank."""
        return list(self._batch.names)

    def add(self, batch: MicroBatch, *, last: bool) -> None:
        """Differentiate the step's one micro-batch."""
        del last  # always: accumulation is refused at setup
        self._batch = batch
        if batch.unseen:
            check_repeatable([loss for loss in batch.losses if loss.requires_grad])
        for index in range(len(batch.names)):
            batch.backward(index)
            self.rows.add(index, [None if p.grad is None else _local(p.grad) for p in self.shared])
            self._own.append({p: p.grad for p in self.others if p.grad is not None})
            for parameter in [*self.shared, *self.others]:
                parameter.grad = None

    def close(self, losses: Tensor, factors: Tensor | None) -> None:
        """Take the losses over all ranks, ``[K]``, to report."""
        del factors
        self._losses = losses

    def measure(self, wanted: Wanted, layer: Sequence[Tensor] | None = None) -> Measured:
        """Measure at all shared parameters: every rank's shards have their part in the products."""
        del layer  # single layers are refused at setup
        if wanted == "nothing" or not self._batch.names:
            return Measured()
        products = gramian(self.rows.matrices(), self._batch.ranks)
        return Measured.of_products(products, norms_only=wanted == "norms")

    def surrogate_loss(
        self, weights: Tensor, head_weights: Tensor | None = None, directions: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Build the loss whose one backward pass gives shared parameters Σ w_k g_k, and all others Σ v_k g_k."""
        del directions  # methods without weights are refused at setup: a rank has parts of the rows
        v = weights if head_weights is None else head_weights
        gradients = weighted_sums(self._own, v.unbind())
        if self._batch.names:
            for parameter, direction in zip(self.shared, self.rows.combine(weights), strict=True):
                if direction is not None:
                    gradients[parameter] = _like(direction, parameter)
        value = (self._losses * weights).sum()
        loss = surrogate(value, list(gradients), lambda outer: [g * outer for g in gradients.values()])
        return self._batch.with_penalty(loss)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(shard: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
