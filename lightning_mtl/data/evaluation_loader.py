"""The loader of validation, test and prediction: one pass over every task's data, under the tasks' names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_mtl.data.streams import Stream

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
            yield batch or dict.fromkeys(self.streams)

    def _prepared(self, batch: Any) -> Any:  # noqa: ANN401 - whatever the dataset yields, collated
        return batch if batch is None or self._read is None else self._read(batch)
