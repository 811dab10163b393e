"""Iterable datasets: the shares of several ranks and workers, and states to resume from."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_mtl.data.order import Shard

State = dict[str, Any]


class StatefulIterable(Protocol):
    """Marks a loader or an iterable dataset whose state can be saved and restored."""

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass, or continue the restored one."""

    def state_dict(self) -> State:
        """Return what has been read, in plain numbers and tensors."""

    def load_state_dict(self, state: State) -> object:
        """Continue after what had been read."""


def is_stateful(data: Iterable[Any]) -> TypeGuard[StatefulIterable]:
    """Return whether data have a state that can be saved and restored."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


class EveryNth(IterableDataset[Any]):
    """Reads all of an iterable dataset and keeps every n-th sample: the share of one worker of one rank.

    Args:
        samples: The dataset.
        shard: Which rank this is, of how many that share the samples.
        over_workers: Whether workers share them, too; otherwise the dataset tells them apart itself.
    """

    def __init__(self, samples: Iterable[Any], shard: Shard, *, over_workers: bool = True) -> None:
        self.samples = samples
        self.shard = shard
        self.over_workers = over_workers
        self.worker, self.workers = 0, 1
        self.seen = 0  # samples of the pass under way, of all readers
        self._start = 0  # where a pass that was interrupted goes on
        # The fingerprint of the first sample of all, kept or not; in shared memory, since a worker may write it.
        self.first = torch.zeros((), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        readers = self.shard.ranks * self.workers
        reader = self.shard.rank * self.workers + self.worker
        self.seen, self._start = self._start, 0
        for sample in self.samples:
            self.seen += 1
            if self.seen == 1 and self.worker == 0:
                self.first.fill_(fingerprint(sample))
            if (self.seen - 1) % readers == reader:
                yield sample

    def go_on_after(self, seen: int) -> None:
        """Start the next pass after this many samples."""
        self.seen = self._start = seen

    def set_epoch(self, epoch: int) -> None:
        """Pass the number of the pass on to the dataset, where it has ``set_epoch``."""
        tell_pass(self.samples, epoch)


class ResumableSamples(EveryNth):
    """Reads a share of an iterable dataset that has a state, and remembers this rank's position in it."""

    def __init__(self, samples: StatefulIterable, shard: Shard) -> None:
        super().__init__(samples, shard)
        self._state = samples

    def state_dict(self) -> State:
        """Return the dataset's own state, and how many samples it has given."""
        return {"seen": self.seen, "samples": self._state.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore the dataset's state and the position in it."""
        self.go_on_after(state["seen"])
        self._state.load_state_dict(state["samples"])


@dataclass(frozen=True)
class BeginWorker:
    """Readies a worker that reads a share: the user's function and dataset find what they would find without us.

    Where workers share one sequence of samples, each reads all of it as the only worker, with the random numbers of the
    first one: a dataset that divides itself, or shuffles by them, is the same sequence in all workers.
    """

    initialize: Callable[[int], object] | None

    def __call__(self, worker: int) -> None:
        """Ready the worker of this number, as DataLoader asks each to be."""
        info: Any = get_worker_info()
        reader = info.dataset
        # The object is frozen, and get_worker_info() returns it to everybody.
        object.__setattr__(info, "dataset", reader.samples)
        if reader.over_workers:
            reader.worker, reader.workers = info.id, info.num_workers
            seed = info.seed - info.id
            for name, value in (("id", 0), ("num_workers", 1), ("seed", seed)):
                object.__setattr__(info, name, value)
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - datasets draw from the global generator, too
        if self.initialize is not None:
            self.initialize(worker)


def fingerprint(data: Any) -> int:  # noqa: ANN401 - a sample or batch of any form
    """Return a number that tells samples apart; 0 for what has neither numbers nor text in it.

    Example:
        >>> fingerprint((torch.zeros(2), {"a": 1})) == fingerprint((torch.zeros(2), {"a": 2}))
        False
        >>> fingerprint(object())
        0
    """
    found = bytearray()

    def add(leaf: Any) -> None:  # noqa: ANN401
        if isinstance(leaf, Tensor):
            if leaf.layout is torch.strided:
                found.extend(leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        else:
            found.extend(leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode())

    apply_to_collection(data, (Tensor, np.ndarray, int, float, complex, str, bytes), add)
    return zlib.crc32(found) + 1 if found else 0


def tell_pass(data: object, number: int) -> None:
    """Call ``set_epoch`` of the data and of their samplers, which may shuffle by it."""
    batches = getattr(data, "batch_sampler", None)
    parts = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    for part in {id(part): part for part in parts}.values():
        set_epoch: Callable[[int], object] | None = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
