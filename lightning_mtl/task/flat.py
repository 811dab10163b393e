"""Flat batches, as Hugging Face's collators make them: inputs and targets side by side in one dict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FlatBatches:
    """Says which keys of a flat batch are inputs, and which are the tasks' targets.

    Args:
        inputs: The keys that the trunk takes as keyword arguments; one key as a plain text is its only positional
            argument. None takes every key that is no target.
        targets: ``{task: key}`` for each task.

    Example:
        >>> flat = FlatBatches(("ids",), {"topic": "labels", "stars": "stars"})
        >>> flat.read({"ids": 1, "labels": 2, "text": "x"}, ["topic", "stars"])
        ({'ids': 1}, {'topic': 2, 'stars': None})
        >>> flat.read({"topic": {"ids": 1, "labels": 2}}, ["topic", "stars"])
        {'topic': ({'ids': 1}, 2)}
    """

    inputs: str | tuple[str, ...] | None
    targets: Mapping[str, str]

    @classmethod
    def of(
        cls, inputs: str | Sequence[str] | None, targets: Mapping[str, str] | None, tasks: Collection[str]
    ) -> FlatBatches | None:
        """Check a module's arguments; None where it has neither. A task that is not named has its own name for a key.

        Raises:
            ValueError: If ``targets`` names an unknown task, or a key is an input and a target.
            TypeError: If an argument is of another kind.
        """
        if inputs is None and targets is None:
            return None
        if targets is not None and not isinstance(targets, Mapping):
            raise TypeError(f"targets must be {{task: key of the batch}}, found {type(targets).__name__}.")
        if unknown := [task for task in targets or {} if task not in tasks]:
            raise ValueError(f"targets names {unknown}, but the tasks are {list(tasks)}.")
        keys = {task: task for task in tasks} | dict(targets or {})
        given = inputs if inputs is None or isinstance(inputs, str) else tuple(inputs)
        named = () if given is None else (given,) if isinstance(given, str) else given
        asked: list[object] = [*named, *keys.values()]
        for wrong in [key for key in asked if not isinstance(key, str)]:
            raise TypeError(f"inputs and targets name keys of the batch by their names, found {wrong!r}.")
        if both := [key for key in named if key in keys.values()]:
            raise ValueError(f"inputs names {both}, which are targets, too; targets are {keys}. Leave them out of one.")
        return cls(given, keys)

    def read(self, batch: Any, tasks: Collection[str], *, labeled: bool = True) -> Any:  # noqa: ANN401 - whatever the loader yields
        """Bring a flat batch into the form ``(inputs, {task: target})``, one of each task into ``{task: pair}``.

        A target whose key is not in the batch is None: the task has no label in it. Other forms stay as they are.

        Args:
            batch: The batch.
            tasks: The module's tasks.
            labeled: Whether there must be a target of some task in a flat batch, as there need not be to predict.

        Raises:
            ValueError: If an input's key is not in the batch, or no target's is.
        """
        if not isinstance(batch, Mapping):
            return batch
        if batch and batch.keys() <= set(tasks):
            return {task: self._pair(task, own) for task, own in batch.items()}
        if labeled and not any(key in batch for key in self.targets.values()):
            raise ValueError(
                f"A flat batch has the keys {sorted(map(str, batch))}, and the tasks' targets are looked for under "
                f"{dict(self.targets)}; name their keys: MultiTaskModule(targets={{task: key}})."
            )
        return self.inputs_in(batch), {task: batch.get(key) for task, key in self.targets.items()}

    def _pair(self, task: str, own: Any) -> Any:  # noqa: ANN401
        if isinstance(own, Mapping):
            return self.inputs_in(own), own.get(self.targets[task])
        if isinstance(own, tuple | list) and len(own) == 2 and own[1] is None and isinstance(own[0], Mapping):
            return self.inputs_in(own[0]), own[0].get(self.targets[task])  # to predict from
        return own

    def inputs_in(self, batch: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Return a flat batch's inputs, as the trunk takes them."""
        if self.inputs is None:
            targets = set(self.targets.values())
            return {key: value for key, value in batch.items() if key not in targets}
        named = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
        if missing := [key for key in named if key not in batch]:
            raise ValueError(
                f"MultiTaskModule(inputs={self.inputs!r}) names {missing}, but the batch has the keys "
                f"{sorted(map(str, batch))}."
            )
        return batch[self.inputs] if isinstance(self.inputs, str) else {key: batch[key] for key in named}
