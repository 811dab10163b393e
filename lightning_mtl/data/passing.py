"""Streams of iterable data and of loaders: read from the beginning in each pass, in an order of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.data.division import Division
from lightning_mtl.data.iterables import EveryNth, State, StatefulIterable, fingerprint, tell_pass
from lightning_mtl.data.order import Shard
from lightning_mtl.data.sources import inner_loader
from lightning_mtl.data.streams import Stream

_ENDED = object()


class PassingStream(Stream):
    """Yields the batches of an iterable dataset or a user's own loader, read from the beginning in each pass.

    Args:
        name: How errors call it.
        batches_of_a_pass: What ``iter()`` begins a pass over.
        batches: How many they are, on the rank that has the most; None where unknown.
        stateful: What has a ``state_dict`` to go on from; without one, batches are read and thrown away.
        division: Who divides samples.
        shard: Which rank this is, of how many.
        reader: What reads the samples and keeps this rank's; without one, every n-th batch is, if ranks are divided.
        workers: How many workers read parts that the dataset tells apart itself.
        generator: Of the seeds of a pass's workers.
    """

    alike_on_ranks = False

    def __init__(
        self,
        name: str,
        batches_of_a_pass: Iterable[Any],
        batches: int | None,
        stateful: StatefulIterable | None,
        *,
        division: Division,
        shard: Shard,
        reader: EveryNth | None = None,
        workers: int = 0,
        generator: Callable[[int], torch.Generator] | None = None,
    ) -> None:
        super().__init__()
        if batches == 0:
            raise ValueError(f"{name} is empty: it has no batch. Leave the task out, or fill it.")
        self.name = name
        self.batches = batches
        self._iterable = batches_of_a_pass
        self._stateful = stateful
        self._division = division
        self._shard = shard
        self._reader = reader
        self._workers = workers
        self._generator = generator
        self._first_read = 0  # the fingerprint of a loader's first batch, this rank's or not
        self._first: list[int] = []  # of the first batch of each worker
        self._ranks_compared = shard.ranks == 1
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
                self._compare_workers(batch)
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
        if (loader := inner_loader(self._iterable)) is not None:
            tell_pass(loader.dataset, self._passes)
            if self._generator is not None:
                loader.generator = self._generator(self._passes)
        iterator = self._share(begun=restored is not None and self._consumed > 0)
        if self._consumed and restored is None:
            for _ in itertools.islice(iterator, self._consumed):
                pass
        return iterator

    def _share(self, *, begun: bool = False) -> Iterator[Any]:
        """Begin to load, and keep this rank's batches where ranks share a loader's."""
        batches = self._begin_loading(self._iterable)
        shared = self._reader is None and self._division.ranks and self._shard.ranks > 1
        return self._every_nth(batches, self._shard.rank + 1 if begun else 0) if shared else batches

    def _every_nth(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        for batch in batches:
            if number == 0:
                self._first_read = fingerprint(batch)
            if number % self._shard.ranks == self._shard.rank:
                yield batch
            number += 1

    def one_pass(self) -> Iterator[Any]:
        """Return the batches of a single pass."""
        batches = self._share()
        for number, batch in enumerate(batches, start=1):
            # A Trainer asks for as many batches as there are said to be, and no more.
            if number == self.batches and next(batches, _ENDED) is not _ENDED:
                raise ValueError(
                    f"{self.name} gives more than its length says, {self.batches} batches of this rank: the rest would "
                    "not be evaluated. Correct its __len__, or leave it out."
                )
            self._compare_workers(batch)
            yield batch

    # What ranks and workers read is compared in the first pass: a wrong answer is seen there

    def _compare_workers(self, batch: Any) -> None:  # noqa: ANN401
        """Warn where the first batches of workers, which give one each in turn, are all the same."""
        if len(self._first) >= (self._workers if self._workers > 1 else self._shard.ranks > 1):
            return
        self._first.append(fingerprint(batch))
        if len(self._first) == self._workers > 1 and self._first[0] and len(set(self._first)) == 1:
            rank_zero_warn(
                f"{self.name}: all {self._workers} workers begin with the same batch, so that each sample is probably "
                f"read {self._workers} times. If the dataset does not tell workers apart (get_worker_info), set "
                "shard_iterables=True."
            )

    def check_ranks(self, gather: Callable[[Any], list[Any]]) -> None:
        """Warn where ranks that share all samples begin differently, or ranks that have their own, alike."""
        if self._ranks_compared:
            return
        self._ranks_compared = True
        if self._division.ranks:
            first = self._first_read if self._reader is None else int(self._reader.first)
        else:
            first = self._first[0] if self._first else 0
        found = [each for each in gather(first) if each]
        if self._division.ranks and len(set(found)) > 1:
            rank_zero_warn(
                f"{self.name}: the ranks begin with different samples, but each is to read all of them and keep every "
                "n-th, so that some samples are lost. If the data divide themselves over ranks, set "
                'shard_iterables=False, or "workers" if not over workers; if they are shuffled or augmented at random, '
                "seed that alike on all ranks."
            )
        if not self._division.ranks and len(found) == self._shard.ranks and len(set(found)) == 1:
            rank_zero_warn(
                f"{self.name}: all {self._shard.ranks} ranks begin with the same batch, so that each sample is "
                f"probably read {self._shard.ranks} times. If the data do not divide themselves over ranks, set "
                'shard_iterables=True, or "ranks" if they do over workers.'
            )

    # Checkpoints

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
        if (loader := inner_loader(self._iterable)) is not None:
            end_workers = getattr(loader._iterator, "_shutdown_workers", None)
            loader._iterator = None
            if end_workers is not None:
                end_workers()
