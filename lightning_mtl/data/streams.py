"""Endless streams of one task's batches, which count what has been consumed and can continue from there."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from lightning_mtl.data.iterables import EveryNth, ResumableSamples, State, StatefulIterable, is_stateful, tell_pass
from lightning_mtl.data.order import Batches, DataPosition, PassOrder, Shard, generator_for
from lightning_mtl.data.sources import DatasetSource, IterableSource, LoaderSource, check_shards


class Stream(ABC):
    """Yields one task's batches, pass after pass; a base class."""

    batches: int | None
    """The batches of a pass over all ranks; None where unknown."""
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

    def close(self) -> None:
        """End the worker processes; the state remains, and the next batch starts them anew."""
        for iterator in self._with_workers:
            iterator._shutdown_workers()

    def _begin_loading(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over a loader, and remember its workers."""
        iterator = iter(loader)
        # To drop the iterator is not enough: the traceback of an error in a dataset refers to it. torch has no public
        # way to end workers; Lightning calls the same method.
        if hasattr(iterator, "_shutdown_workers"):
            self._with_workers.add(iterator)
        return iterator


def open_stream(
    source: DatasetSource | IterableSource | LoaderSource,
    shard: Shard,
    seed: int,
    *,
    shuffle: bool,
    shard_iterables: bool | None,
) -> Stream:
    """Open the stream of a source for a rank.

    Raises:
        ValueError: If the ranks cannot divide the source, or it has no batch.
    """
    check_shards(source, shard, shard_iterables)
    if isinstance(source, DatasetSource):
        return OrderedStream(source, shard, seed, shuffle=shuffle)
    if isinstance(source, LoaderSource):
        stateful = source.loader if is_stateful(source.loader) else None
        return PassingStream(source.name, source.loader, _length_if_known(source.loader), stateful)
    return _iterable_stream(source, shard, seed, divided=shard_iterables is not True)


class OrderedStream(Stream):
    """Yields the batches of a map-style dataset, in an order that is a function of seed, pass and position.

    Workers may have loaded further than what has been consumed: the position counts what :meth:`next` has returned.
    """

    alike_on_ranks = True

    def __init__(self, source: DatasetSource, shard: Shard, seed: int, *, shuffle: bool) -> None:
        super().__init__()
        self.source = source
        shuffle = shuffle and source.shuffle
        drop_last = source.drop_last and source.stage == "train"
        self.order = PassOrder(
            len(source.dataset), source.batch_size, shard, seed, source.task, shuffle=shuffle, drop_last=drop_last
        )
        if not self.order.batches:
            raise ValueError(
                f"{source.name} has {self.order.size} samples, fewer than the {self.order.global_batch} of one batch "
                f"on {shard.ranks} ranks, and drop_last drops what is incomplete. Use drop_last=False or a smaller "
                "batch_size."
            )
        self.batches = self.order.batches
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


class PassingStream(Stream):
    """Yields the batches of an iterable dataset or a user's own loader, read from the beginning in each pass.

    Args:
        name: How errors call it.
        batches_of_a_pass: What ``iter()`` begins a pass over.
        batches: How many they are, if known.
        stateful: What has a ``state_dict`` to go on from; without one, batches are read and thrown away.
    """

    alike_on_ranks = False

    def __init__(
        self, name: str, batches_of_a_pass: Iterable[Any], batches: int | None, stateful: StatefulIterable | None
    ) -> None:
        super().__init__()
        if batches == 0:
            raise ValueError(f"{name} is empty: it has no batch. Leave the task out, or fill it.")
        self.name = name
        self.batches = batches
        self._iterable = batches_of_a_pass
        self._stateful = stateful
        self._passes = self._consumed = 0
        self._restored: State | None = None  # a state of the data, from which the pass that begins goes on
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:  # noqa: ANN401
        """Return the next batch of this rank, from a new pass where this one has ended."""
        for _ in range(2):  # the pass under way, then a new one
            if self._iterator is None:
                self._iterator = self._begin()
            for batch in self._iterator:
                self._consumed += 1
                return batch
            if not self._consumed:
                break
            self._passes, self._consumed, self._iterator = self._passes + 1, 0, None
        raise ValueError(
            f"{self.name} ended at once: pass {self._passes + 1} over it gave no batch. A loader or iterable dataset "
            "has to begin anew each time iter() is called on it, with a sample for every rank."
        )

    def _begin(self) -> Iterator[Any]:
        restored, self._restored = self._restored, None
        if restored is not None and self._stateful is not None:
            self._stateful.load_state_dict(restored)
        tell_pass(self._iterable, self._passes)
        tell_pass(getattr(self._iterable, "dataset", None), self._passes)
        iterator = self._begin_loading(self._iterable)
        if self._consumed and restored is None:
            for _ in itertools.islice(iterator, self._consumed):
                pass
        return iterator

    def one_pass(self) -> Iterator[Any]:
        """Return the batches of a single pass."""
        return self._begin_loading(self._iterable)

    def rewind(self) -> None:
        """Start again with the first pass."""
        self._passes, self._consumed, self._iterator, self._restored = 0, 0, None, None

    def state_dict(self) -> State:
        """Return the passes, the batches of the current one, and the data's own state where it has one."""
        own = self._restored
        if self._iterator is not None and self._stateful is not None:
            own = self._stateful.state_dict()
        return {"passes": self._passes, "batches": self._consumed, "data": own}

    def load_state_dict(self, state: State) -> None:
        """Continue after what has been consumed."""
        self._passes, self._consumed, self._iterator = state["passes"], state["batches"], None
        self._restored = state["data"] if self._stateful is not None else None

    def close(self) -> None:
        """End the worker processes, those that persist, too."""
        self.load_state_dict(self.state_dict())
        super().close()
        # Loaders keep their iterator under this name if its workers persist; Lightning resets it there, too.
        if isinstance(self._iterable, DataLoader):
            self._iterable._iterator = None


def _iterable_stream(source: IterableSource, shard: Shard, seed: int, *, divided: bool) -> PassingStream:
    """A stream of an iterable dataset; ``divided`` where the dataset tells ranks and workers apart itself."""
    samples, batch_size = source.samples, source.batch_size
    own = Shard() if divided else shard
    # A dataset's state is at hand in this process alone, not in workers'.
    resumable = ResumableSamples(samples, own) if is_stateful(samples) and source.num_workers == 0 else None
    read = samples if divided else EveryNth(samples, own)
    read = read if resumable is None else resumable
    # Nobody knows whether the length of a dataset that divides itself is the whole or a share.
    size = None if divided and shard.ranks > 1 else _length_if_known(samples)
    if size == 0:
        raise ValueError(f"{source.name} is empty: {type(samples).__name__} has no sample. Leave the task out.")
    options = {**source.options, "generator": generator_for(seed, "workers", source.task, shard.rank)}
    # A new pass reaches workers with a new copy of the dataset.
    options["persistent_workers"] = False
    loader: DataLoader[Any] = DataLoader(read, batch_size=batch_size, drop_last=source.drop_last, **options)
    batches = None if size is None else -(-size // (batch_size * shard.ranks))
    return PassingStream(source.name, loader, batches, resumable)


def _length_if_known(data: object) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a loader has __len__, whether or not its dataset has
        return None
