"""The processes that train together sum their numbers here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor

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
        self.size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    @classmethod
    def alone(cls) -> Ranks:
        """A process by itself, whatever else runs."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks._waiting = None, 1, nullcontext
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

    def _wait(self, work: dist.Work) -> None:
        with self._waiting("waiting"):
            work.wait()


def _nothing() -> None:
    pass
