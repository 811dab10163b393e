"""A mixing mode that changes with the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_mtl.data.mixing import Mixing, Sizes
from lightning_mtl.task import Task


@dataclass(frozen=True)
class Schedule(Mixing):
    """Changes the mixing mode with the epoch.

    All epochs have the same number of steps, since Lightning asks once: ``steps_per_epoch``, or that of epoch 0's mode.

    Args:
        modes: ``{first epoch: mode}``, with an entry for epoch 0; or a function of the epoch that returns a mode.

    Raises:
        ValueError: If epoch 0 has no mode, or an epoch is negative.
        TypeError: If an entry is no mode.

    Example:
        >>> from lightning_mtl.data import Proportional
        >>> warm_up = Schedule({0: Proportional(), 5: Proportional(temperature=4)})
        >>> warm_up.in_epoch(4), warm_up.in_epoch(5)
        (Proportional(temperature=1.0), Proportional(temperature=4))
        >>> annealed = Schedule(lambda epoch: Proportional(temperature=max(1, 5 - epoch)))
        >>> annealed.in_epoch(2)
        Proportional(temperature=3)
    """

    modes: Mapping[int, Mixing] | Callable[[int], Mixing]

    def __post_init__(self) -> None:
        if isinstance(self.modes, Mapping):
            if 0 not in self.modes or min(self.modes) < 0:
                raise ValueError(
                    f"Schedule has modes from the epochs {sorted(self.modes)} on; say one for epoch 0, which is the "
                    "first."
                )
            for epoch, mode in self.modes.items():
                _check_mode(mode, epoch)
        elif not callable(self.modes):
            raise TypeError(
                f"Schedule must get {{first epoch: mode}} or a function of the epoch, found {self.modes!r}."
            )

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse modes that name other tasks; those that a function returns are checked in their epoch."""
        for mode in self._known_modes():
            mode.check(tasks)

    @property
    def follows(self) -> bool:
        """Return whether a mode follows validation; of those that a function returns, that of epoch 0."""
        return any(mode.follows for mode in self._known_modes())

    def check_goals(self, tasks: Mapping[str, Task], validated: Sequence[str]) -> None:
        """Refuse modes that could not follow the tasks; of those that a function returns, that of epoch 0."""
        for mode in self._known_modes():
            mode.check_goals(tasks, validated)

    def _known_modes(self) -> list[Mixing]:
        return list(self.modes.values()) if isinstance(self.modes, Mapping) else [self.in_epoch(0)]

    def in_epoch(self, epoch: int) -> Mixing:
        """Return the mode with the latest first epoch, or what the function returns."""
        if isinstance(self.modes, Mapping):
            return self.modes[max(first for first in self.modes if first <= epoch)]
        mode = self.modes(epoch)
        _check_mode(mode, epoch)
        return mode

    def steps(self, sizes: Sizes) -> int:
        """Return the steps of epoch 0's mode."""
        return self.in_epoch(0).steps(sizes)

    def order(self, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[tuple[str, ...]]:
        """Return the order of epoch 0's mode; a loader asks the mode of its own epoch instead."""
        return self.in_epoch(0).order(sizes, steps, generator)


def _check_mode(mode: object, epoch: int) -> None:
    if not isinstance(mode, Mixing) or isinstance(mode, Schedule):
        raise TypeError(f"Schedule has {mode!r} for epoch {epoch}, where a mode such as Joint() belongs.")
