"""A sharded module without a trunk is whole while it takes a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mtl.devices import numbers
from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.torch_internals import reduces_in_another_dtype
from lightning_mtl.task.module import TaskModule


class Whole:
    """Gathers all parameters before a step's first forward pass, and shards its gradients after the last backward pass.

    FSDP2's own hooks average gradients in backward passes, one part of the module at a time, and free its parameters
    there. Losses that differentiate the model need them once more, and a rank that lacks a task would have to pass the
    same parts backward in the same order. Without collectives in forward and backward passes a step is the one of DDP.
    Between steps parameters are sharded, and gradients and the optimizer's state always.

    Args:
        ranks: The processes with different data.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._pairs: list[tuple[Tensor, DTensor]] = []  # each parameter, whole and sharded, while a step is under way

    def gather(self, module: TaskModule) -> None:
        """Make the parameters whole."""
        self._shard(module)  # after an evaluation, or a step that failed
        sharded = [p for p in module.parameters() if isinstance(p, DTensor)]
        gather_whole(module)
        self._pairs = list(zip(module.parameters(), sharded, strict=True))
        for whole, _ in self._pairs:
            whole.grad = None
        self._rename(module, {shard: whole for whole, shard in self._pairs})

    @torch.no_grad()
    def scatter(self, module: TaskModule) -> None:
        """Average the gradients over the ranks, give each its shards, and shard the parameters again."""
        if not self._pairs:
            return
        there = [float(whole.grad is not None) for whole, _ in self._pairs]
        flags = self.ranks.sum(numbers(there, module.device)).tolist()
        found = [pair for pair, flag in zip(self._pairs, flags, strict=True) if flag]
        gradients = [torch.zeros_like(whole) if whole.grad is None else whole.grad for whole, _ in found]
        arrivals = [self.ranks.begin_sum(gradient) for gradient in gradients]
        for (whole, shard), gradient, arrive in zip(found, gradients, arrivals, strict=True):
            arrive()
            mean = (gradient / self.ranks.size).to(shard.dtype)
            own = distribute_tensor(mean, shard.device_mesh, shard.placements, src_data_rank=None)
            shard.grad = own if shard.grad is None else shard.grad + own
            whole.grad = None
        self._shard(module)

    def _shard(self, module: TaskModule) -> None:
        shard_again(module)
        self._rename(module, dict(self._pairs))
        self._pairs = []

    @staticmethod
    def _rename(module: TaskModule, names: dict[Tensor, Tensor]) -> None:
        if module.sharing is not None:
            module.sharing.rename(names)


def gather_whole(module: TaskModule) -> None:
    """Make the parameters of a sharded module without a trunk whole, in all its parts at once.

    In forward passes the ranks would have to come by the same parts in the same order. FSDP2 is told to leave both the
    parameters and their gradients alone.
    """
    for part in _parts(module):
        part.set_requires_gradient_sync(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def shard_again(module: TaskModule) -> None:
    """Free what :func:`gather_whole` has gathered."""
    for part in _parts(module):
        part.reshard()


def check_can_be_whole(module: TaskModule) -> None:
    """Refuse ways to shard in which gradients of whole parameters are not all that there is.

    Raises:
        ValueError: If a policy keeps parameters elsewhere, or sums gradients in another dtype.
    """
    if module.the_trunk is not None:
        return
    name = type(module).__name__
    if any(p.device.type != p.device_mesh.device_type for p in module.parameters() if isinstance(p, DTensor)):
        raise ValueError(
            f"{name} has no trunk, and its parameters are whole in each step, on the device that computes: leave out "
            "fully_shard(offload_policy=CPUOffloadPolicy()), or use a MultiTaskModule."
        )
    if any(reduces_in_another_dtype(part) for part in _parts(module)):
        raise ValueError(
            f"{name} has no trunk, and its gradients are summed over the ranks in the parameters' dtype: leave out "
            "MixedPrecisionPolicy(reduce_dtype=...) of fully_shard, or use a MultiTaskModule."
        )


def _parts(module: TaskModule) -> list[FSDPModule]:
    """The sharded parts of a module without a trunk."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)] if module.the_trunk is None else []
