"""Iterable datasets: the shares of several ranks and workers, and states to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeGuard

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
    """Reads all of an iterable dataset and keeps every n-th sample: the share of one worker of one rank."""

    def __init__(self, samples: Iterable[Any], shard: Shard) -> None:
        self.samples = samples
        self.shard = shard
        self.seen = 0  # samples of the pass under way, of all readers
        self._start = 0  # where a pass that was interrupted goes on

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readers, reader = self.shard.ranks * workers, self.shard.rank * workers + worker
        self.seen, self._start = self._start, 0
        for sample in self.samples:
            self.seen += 1
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


def tell_pass(data: object, number: int) -> None:
    """Call ``set_epoch`` of the data and of their sampler, which may shuffle by it."""
    for part in (data, getattr(data, "sampler", None)):
        set_epoch: Callable[[int], object] | None = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
