"""The loaders: training steps of the tasks that a mixing mode chooses, and evaluation passes over all data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lightning_mtl.data.mixing import Mixing
from lightning_mtl.data.order import Shard, generator_for
from lightning_mtl.data.streams import Stream
from lightning_mtl.distributed import of_each


class MixedLoader:
    """Yields ``{task: batch}`` for each step of an epoch, and remembers what has been consumed.

    A task's batches come from one endless stream: an epoch goes on where the last one stopped, so that a task whose
    pass is longer than an epoch is still seen evenly. The tasks of a step are a function of seed and epoch, the same on
    every rank. A task of the step of which this rank has no sample is None.

    Args:
        streams: ``{task: stream}``.
        mixing: Which tasks a step takes.
        steps: The steps of an epoch.
        seed: Of the order of tasks.
        shard: Which rank this is, of how many.
        gather: Collects a value from all ranks, for a checkpoint.
        same_epoch: Repeat the first epoch for ever, for a Trainer that overfits batches.
        one_pass: Makes a loader that reads all samples once, beside this one.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        mixing: Mixing,
        steps: int,
        seed: int,
        shard: Shard,
        gather: Callable[[Any], list[Any]],
        *,
        same_epoch: bool = False,
        one_pass: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        self.one_pass = one_pass
        self.streams = dict(streams)
        self.mixing = mixing
        self.steps = steps
        self.seed = seed
        self.shard = shard
        self._gather = gather
        self._same_epoch = same_epoch
        self._epoch = 0
        self._consumed = (0, 0)  # epoch, steps of it
        self._restored = False

    @property
    def sampler(self) -> MixedLoader:
        """Return the loader itself, because Lightning calls ``sampler.set_epoch`` of each loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        """The steps of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's steps; nothing is loaded, and no epoch begins, before the first is asked for."""
        epoch = self._epoch
        # Only the epoch that was interrupted goes on in its middle.
        first = self._consumed[1] if self._restored and self._consumed[0] == epoch else 0
        self._restored = False
        if self._same_epoch:
            for stream in self.streams.values():
                stream.rewind()
        for number, tasks in enumerate(itertools.islice(self._order(epoch), first, None), start=first + 1):
            batch = {task: self.streams[task].next() for task in tasks}
            for task in tasks:
                self.streams[task].check_ranks(self._gather)
            self._consumed = (epoch, number)
            yield batch

    def _order(self, epoch: int) -> Iterator[tuple[str, ...]]:
        epoch = 0 if self._same_epoch else epoch
        sizes = {task: stream.batches for task, stream in self.streams.items()}
        mode = self.mixing.in_epoch(epoch)
        mode.check(list(sizes))
        return mode.order(sizes, self.steps, generator_for(self.seed, "mixing", epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return what has been consumed; all ranks must call this together."""
        states = {task: stream.state_dict() for task, stream in self.streams.items()}
        alike = {task: states[task] for task, stream in self.streams.items() if stream.alike_on_ranks}
        own = {task: states[task] for task in self.streams if task not in alike}
        epoch, step = self._consumed
        ranks = self._gather(own) if own else []
        return {"seed": self.seed, "epoch": epoch, "step": step, "tasks": alike, "ranks": ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after what has been consumed.

        Raises:
            ValueError: If the state is that of other tasks, or of another number of ranks where that matters.
        """
        ranks = state["ranks"]
        if ranks and len(ranks) != self.shard.ranks:
            raise ValueError(
                f"The checkpoint was written on {len(ranks)} ranks, there are {self.shard.ranks}; the places of the "
                f"ranks in {sorted(ranks[0])} cannot be told for another number. Resume on {len(ranks)}, or begin anew."
            )
        found = {**state["tasks"], **(ranks[self.shard.rank] if ranks else {})}
        if set(found) != set(self.streams):
            raise ValueError(
                f"The checkpoint is in the midst of the data of {sorted(found)}, the training data has "
                f"{sorted(self.streams)}; resume with the same tasks."
            )
        for task, stream in self.streams.items():
            stream.load_state_dict(found[task])
        self._epoch = state["epoch"]
        self._consumed = (state["epoch"], state["step"])
        self._restored = True


_ENDED = object()


class EvaluationLoader:
    """Yields ``{task: batch}`` with a batch of every task that is not at its end, until all are.

    Every sample is seen once, on one rank. All ranks take the same number of steps, so that none waits for another;
    where the others alone have a sample left, a task's batch is None.

    Args:
        streams: ``{task: stream}``.
        anyone: Whether any rank has a batch left, asked where lengths are unknown; None where they are known.
        read: What becomes of a batch.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        anyone: Callable[[bool], bool] | None = None,
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        self.streams = dict(streams)
        self._anyone = anyone
        self._read = read

    def __len__(self) -> int:
        """As many steps as the longest task has batches.

        Raises:
            TypeError: If that is unknown, as Python has it for what has no length.
        """
        lengths = [stream.batches for stream in self.streams.values()]
        if self._anyone is not None or None in lengths:
            raise TypeError("An iterable dataset has no length.")
        return max(length for length in lengths if length is not None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One step after the other."""
        running = {task: stream.one_pass() for task, stream in self.streams.items()}
        while True:
            batch: dict[str, Any] = {}
            for task, batches in list(running.items()):
                found = next(batches, _ENDED)
                if found is _ENDED:
                    del running[task]
                else:
                    batch[task] = self._prepared(found)
            if not (self._anyone(bool(batch)) if self._anyone is not None else batch):
                return
            for stream in self.streams.values():
                stream.check_ranks(of_each)
            yield batch or dict.fromkeys(self.streams)

    def _prepared(self, batch: Any) -> Any:  # noqa: ANN401 - whatever the dataset yields, collated
        return batch if batch is None or self._read is None else self._read(batch)
