"""The loaders: training steps of the tasks that a mixing mode chooses, and evaluation passes over all data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_mtl.data.mixing import Mixing, Progress, Ratios
from lightning_mtl.data.order import Shard, generator_for
from lightning_mtl.data.streams import Stream
from lightning_mtl.distributed import of_each
from lightning_mtl.task.module import TaskModule

Scores = Mapping[str, Mapping[str, float]]  # {task: {"loss" or metric: value}}


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

    Attributes:
        trainer: Whose validation a mode may follow; None follows none.
        shares: The tasks' shares of the epoch's steps, where the mode follows their progress.
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
        self.trainer: pl.Trainer | None = None
        self._first: Scores = {}
        self.shares: dict[str, float] | None = None
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
        going_on, self._restored = self._restored and first > 0, False
        if self._same_epoch:
            for stream in self.streams.values():
                stream.rewind()
        order = self._order(epoch, self._mode(epoch, going_on=going_on))
        for number, tasks in enumerate(itertools.islice(order, first, None), start=first + 1):
            batch = {task: self.streams[task].next() for task in tasks}
            for task in tasks:
                self.streams[task].check_ranks(self._gather)
            self._consumed = (epoch, number)
            yield batch

    def _mode(self, epoch: int, *, going_on: bool) -> Mixing:
        """The mode of an epoch; one that goes on in its middle keeps the shares that it began with."""
        mode = self.mixing.in_epoch(0 if self._same_epoch else epoch)
        mode.check(list(self.streams))
        if not going_on:
            progress = None if self._same_epoch else self._progress()
            self.shares = None if progress is None else mode.shares(progress)
            if progress is not None and self.shares is not None:
                self._first = {task: dict(scores) for task, scores in progress.first.items()}
                # Ranks with devices of several kinds may differ in a last digit, which must not part their ways.
                self.shares = self._gather(self.shares)[0]
        return mode if self.shares is None else Ratios(self.shares)

    def _progress(self) -> Progress | None:
        """How far the tasks are by the newest validation of the fit; None before one."""
        module = None if self.trainer is None else self.trainer.lightning_module
        newest = module.stage_scores["val"] if isinstance(module, TaskModule) else {}
        if not isinstance(module, TaskModule) or not newest:
            return None
        return Progress({task: module.tasks[task] for task in self.streams}, newest, self._first or newest)

    def _order(self, epoch: int, mode: Mixing) -> Iterator[tuple[str, ...]]:
        epoch = 0 if self._same_epoch else epoch
        sizes = {task: stream.batches for task, stream in self.streams.items()}
        return mode.order(sizes, self.steps, generator_for(self.seed, "mixing", epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return what has been consumed; all ranks must call this together."""
        states = {task: stream.state_dict() for task, stream in self.streams.items()}
        alike = {task: states[task] for task, stream in self.streams.items() if stream.alike_on_ranks}
        own = {task: states[task] for task in self.streams if task not in alike}
        epoch, step = self._consumed
        ranks = self._gather(own) if own else []
        state = {"seed": self.seed, "epoch": epoch, "step": step, "tasks": alike, "ranks": ranks}
        return state if self.shares is None else {**state, "shares": dict(self.shares), "first": dict(self._first)}

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
        self.shares, self._first = state.get("shares"), dict(state.get("first", {}))
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
