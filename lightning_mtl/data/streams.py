"""Endless streams of one task's batches, which count what has been consumed and can continue from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from lightning_mtl.data.iterables import State
from lightning_mtl.data.order import Batches, DataPosition, PassOrder, Shard, Singles, generator_for
from lightning_mtl.data.sources import DatasetSource


class Stream(ABC):
    """Yields one task's batches, pass after pass; a base class."""

    batches: int | None
    """The batches of a pass over all ranks; None where unknown."""
    samples: int | None = None
    """The samples of a map-style dataset, which have to be those of all ranks."""
    alike_on_ranks: bool
    """Whether the state is the same on all ranks."""

    def __init__(self) -> None:
        self._with_workers: WeakSet[Any] = WeakSet()

    @abstractmethod
    def next(self) -> Any:  # noqa: ANN401 - whatever the dataset yields, collated
        """Return the next batch of this rank; None where the last samples of a pass went to other ranks."""

    @abstractmethod
    def one_pass(self) -> Iterator[Any]:
        """Return the batches of a single pass, from its beginning."""

    @abstractmethod
    def rewind(self) -> None:
        """Start again with the first pass."""

    @abstractmethod
    def state_dict(self) -> State:
        """Return what has been consumed, in plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Continue after what has been consumed."""

    def check_ranks(self, gather: Callable[[Any], list[Any]]) -> None:  # noqa: B027 - most have nothing to compare
        """Compare what the ranks read, once, after the first batch; all ranks call this together."""

    def close(self) -> None:
        """End the worker processes; the state remains, and the next batch starts them anew."""
        for iterator in self._with_workers:
            if isinstance(iterator, Generator):
                iterator.close()
            else:
                iterator._shutdown_workers()

    def _begin_loading(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over a loader, and remember its workers."""
        iterator = iter(loader)
        # To drop the iterator is not enough: the traceback of an error in a dataset refers to it. torch has no public
        # way to end workers; Lightning calls the same method. A generator, as webdataset's loader gives, ends its own.
        if hasattr(iterator, "_shutdown_workers") or isinstance(iterator, Generator):
            self._with_workers.add(iterator)
        return iterator


class OrderedStream(Stream):
    """Yields the batches of a map-style dataset, in an order that is a function of seed, pass and position.

    Workers may have loaded further than what has been consumed: the position counts what :meth:`next` has returned.
    """

    alike_on_ranks = True

    def __init__(self, source: DatasetSource, shard: Shard, seed: int, *, shuffle: bool) -> None:
        super().__init__()
        self.source = source
        shuffle = shuffle and source.shuffle
        size, batch_size = len(source.dataset), source.batch_size or 1
        self.order = PassOrder(
            size if source.draws is None or not shuffle else source.draws,
            batch_size,
            shard,
            seed,
            source.task,
            shuffle=shuffle,
            drop_last=source.drop_last,
            draw=source.draw,
            population=size,
        )
        if not self.order.batches:
            raise ValueError(
                f"{source.name} has {self.order.size} samples, fewer than the {self.order.global_batch} of one batch "
                f"on {shard.ranks} ranks, and drop_last drops what is incomplete. Use drop_last=False or a smaller "
                "batch_size."
            )
        self.batches = self.order.batches
        self.samples = size
        self.position = DataPosition()
        # Torch's global generator, from which workers would get their seed, is left as it is.
        self._generator = generator_for(seed, "workers", source.task, shard.rank)
        self._iterator: Iterator[Any] | None = None
        self._one_pass_loader: DataLoader[Any] | None = None

    def next(self) -> Any:  # noqa: ANN401
        """Return the next batch of this rank."""
        # A rank without a sample in the last batch of a pass returns None; its sampler skips that batch, too.
        batch = None
        if self.order.share(self.position):
            if self._iterator is None:
                self._iterator = self._begin_loading(self._loader(Batches(self.order, self.position)))
            batch = next(self._iterator)
        self.position = self.order.after(self.position)
        return batch

    def _loader(self, batches: Batches) -> DataLoader[Any]:
        options = {**self.source.options, "generator": self._generator}
        if self.source.batch_size is None:
            return DataLoader(self.source.dataset, sampler=Singles(batches), batch_size=None, **options)
        if self.source.whole_batches:
            return DataLoader(self.source.dataset, sampler=batches, batch_size=None, **options)
        return DataLoader(self.source.dataset, batch_sampler=batches, **options)

    def one_pass(self) -> Iterator[Any]:
        """Return the batches of a single pass; None where only other ranks have samples left."""
        if self._one_pass_loader is None:  # kept, for workers that persist
            self._one_pass_loader = self._loader(Batches(self.order, DataPosition(), one_pass=True))
        loaded, position = self._begin_loading(self._one_pass_loader), DataPosition()
        while position.passes == 0:
            yield next(loaded) if self.order.share(position) else None
            position = self.order.after(position)

    def rewind(self) -> None:
        """Start again with the first pass."""
        self.load_state_dict({"passes": 0, "samples": 0})

    def state_dict(self) -> State:
        """Return the passes, and the current one's samples on all ranks, independent of batch size and rank count."""
        return {"passes": self.position.passes, "samples": self.position.samples}

    def load_state_dict(self, state: State) -> None:
        """Continue after what has been consumed."""
        self.position = DataPosition(state["passes"], state["samples"])
        self._iterator = None

    def close(self) -> None:
        """End the worker processes, those that persist, too."""
        super().close()
        self._iterator = self._one_pass_loader = None
