"""Sums over the processes that train together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from lightning_mtl.phases import Phases


class Ranks:
    """The processes that share the work on a batch; one process is the plain case and costs nothing.

    Args:
        group: The processes that hold different data; None takes all of them.
        phases: Where the time spent on waiting for the others is noted.

    Example:
        >>> import torch
        >>> Ranks().size, Ranks().sum(torch.ones(2))
        (1, tensor([1., 1.]))
    """

    def __init__(self, group: dist.ProcessGroup | None = None, phases: Phases | None = None) -> None:
        self.group = group
        self._phases = Phases() if phases is None else phases
        self.size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    @classmethod
    def alone(cls) -> Ranks:
        """A process by itself, whatever else runs."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.size, ranks._phases = None, 1, Phases()
        return ranks

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; its shape must agree on all of them."""
        self.begin_sum(tensor)()
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the ranks, in place; call what is returned before reading it."""
        if self.size == 1:
            return _nothing
        with self._phases("waiting"):
            work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return _nothing if work is None else functools.partial(self._wait, work)

    def _wait(self, work: dist.Work) -> None:
        with self._phases("waiting"):
            work.wait()


def _nothing() -> None:
    pass
