"""Sums over the processes that train together."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that share the work on a batch; one process is the plain case and costs nothing.

    Args:
        group: The processes that hold different data; None takes all of them.

    Example:
        >>> import torch
        >>> Ranks().size, Ranks().sum(torch.ones(2))
        (1, tensor([1., 1.]))
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    @classmethod
    def alone(cls) -> Ranks:
        """A process by itself, whatever else runs."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size = None, 1
        return ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; its shape must agree on all of them."""
        self.begin_sum(tensor)()
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the ranks, in place; call what is returned before reading it."""
        if self.size == 1:
            return _nothing
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return _nothing if work is None else work.wait


def _nothing() -> None:
    pass
