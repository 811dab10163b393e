"""The processes that train together sum, gather and share their numbers here, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import SumMetric
from torchmetrics.utilities.distributed import gather_all_tensors

Waiting = Callable[[str], AbstractContextManager[object]]


class Ranks:
    """The processes that share the work on a batch; one process is the plain case and costs nothing.

    Args:
        group: The processes that hold different data; None takes all of them.
        waiting: Called with ``"waiting"``, makes the block in which the others are waited for; it may note the time.

    Example:
        >>> import torch
        >>> Ranks().size, Ranks().sum(torch.ones(2))
        (1, tensor([1., 1.]))
    """

    def __init__(self, group: dist.ProcessGroup | None = None, waiting: Waiting | None = None) -> None:
        self.group = group
        self._waiting: Waiting = nullcontext if waiting is None else waiting
        self.size = dist.get_world_size(group) if _number_of_processes() > 1 else 1
        self.rank = dist.get_rank(group) if self.size > 1 else 0

    @classmethod
    def alone(cls) -> Ranks:
        """A process by itself, whatever else runs."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks.rank, ranks._waiting = None, 1, 0, nullcontext
        return ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; its shape must agree on all of them."""
        self.begin_sum(tensor)()
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the ranks, in place; call what is returned before reading it."""
        if self.size == 1:
            return _nothing
        with self._waiting("waiting"):
            work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return _nothing if work is None else functools.partial(self._wait, work)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in their order; its shape must agree on all of them."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._waiting("waiting"):
            dist.all_gather(found, tensor, group=self.group)
        return found

    def part_of(self, tensor: Tensor) -> Tensor:
        """This rank's share of the last dimension of what all ranks hold."""
        return tensor.tensor_split(self.size, dim=-1)[self.rank]

    def _wait(self, work: dist.Work) -> None:
        with self._waiting("waiting"):
            work.wait()


def sum_over(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Sum a tensor over a Trainer's processes, by whatever its strategy sums with, a TPU's too."""
    return cast("Tensor", trainer.strategy.reduce(tensor, reduce_op="sum"))


def gather(tensor: Tensor, ranks: Ranks, dim: int) -> Tensor:
    """Concatenate the ranks' tensors, whose sizes may differ along ``dim``."""
    return tensor if ranks.size == 1 else torch.cat(gather_all_tensors(tensor, ranks.group), dim=dim)


def of_first(value: Any) -> Any:  # noqa: ANN401 - plain values
    """Return rank 0's value on every rank."""
    if _number_of_processes() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def of_each(value: Any) -> list[Any]:  # noqa: ANN401 - plain values
    """Return the value of every rank, in their order."""
    found: list[Any] = [value] * _number_of_processes()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def _number_of_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _nothing() -> None:
    pass


def log_reduced(module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log an epoch's figures that are over all ranks already.

    As metrics, which Lightning asks for their value as they are: of plain numbers it would advise each user to reduce
    them over the ranks once more.
    """
    for name, value in values.items():
        figure = SumMetric(nan_strategy="disable", sync_on_compute=False)
        figure.update(value)
        module.log(name, figure, metric_attribute=name, batch_size=1)
