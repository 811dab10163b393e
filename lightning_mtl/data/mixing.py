"""Mixing modes: which tasks a training step takes a batch from."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from lightning_mtl.task import Task

Sizes = Mapping[str, int | None]
Until = Literal["longest", "shortest"]


class Progress(NamedTuple):
    """How far the tasks are, for modes that follow it.

    Args:
        tasks: What the module declares of each task, in the order of the data.
        newest: ``{task: {"loss" or metric: value}}`` of the newest validation, over all ranks.
        first: The same of the validation that the first epoch with such shares began after.
    """

    tasks: Mapping[str, Task]
    newest: Mapping[str, Mapping[str, float]]
    first: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Mixing(ABC):
    """Decides how many steps an epoch has, and which tasks give a batch in each; the base class of mixing modes.

    Sizes are counted in batches of one pass over a task's data on all ranks together, None where that is unknown.

    Example:
        >>> class Reversed(Mixing):
        ...     def steps(self, sizes):
        ...         return len(sizes)
        ...
        ...     def order(self, sizes, steps, generator):
        ...         return itertools.islice(itertools.cycle((task,) for task in reversed(sizes)), steps)
        >>> list(Reversed().order({"a": 2, "b": 1}, 3, torch.Generator()))
        [('b',), ('a',), ('b',)]
    """

    @abstractmethod
    def steps(self, sizes: Sizes) -> int:
        """Return the number of steps of an epoch, where the user did not give ``steps_per_epoch``."""

    @abstractmethod
    def order(self, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[tuple[str, ...]]:
        """Return the tasks that give a batch in each step of an epoch; random choices come from the generator alone."""

    def check(self, tasks: Sequence[str]) -> None:  # noqa: B027 - most modes have no names to check
        """Refuse names that are no task of the data."""

    @property
    def follows(self) -> bool:
        """Whether :meth:`shares` looks at the tasks' validation."""
        return False

    def check_goals(self, tasks: Mapping[str, Task], validated: Sequence[str]) -> None:  # noqa: B027 - most have none
        """Refuse, at setup, what no progress can be followed of; ``validated`` are the tasks with validation data."""

    def in_epoch(self, epoch: int) -> Mixing:
        """Return the mode of an epoch."""
        return self

    def shares(self, progress: Progress) -> dict[str, float] | None:
        """Return the tasks' shares of an epoch that begins after a validation, for a mode that follows it; or None."""
        return None


@dataclass(frozen=True)
class Joint(Mixing):
    """Takes one batch from every task in every step.

    Args:
        until: An epoch lasts until the task with the most batches (``"longest"``) has been seen once, while the others
            begin anew in another order; or until the one with the fewest (``"shortest"``) has.

    Raises:
        ValueError: If ``until`` is neither of the two.

    Example:
        >>> Joint().steps({"a": 10, "b": 4}), Joint("shortest").steps({"a": 10, "b": 4})
        (10, 4)
    """

    until: Until = "longest"

    def __post_init__(self) -> None:
        _check_until(self)

    def steps(self, sizes: Sizes) -> int:
        """Return the batches of the longest task, or of the shortest."""
        return _TURNS_UNTIL[self.until](_known(sizes, self))

    def order(self, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[tuple[str, ...]]:
        """Return all tasks for every step."""
        return itertools.repeat(tuple(sizes), steps)


@dataclass(frozen=True)
class RoundRobin(Mixing):
    """Takes a batch from one task in each step; the tasks take turns, in the order of the data.

    With ``accumulate_grad_batches`` = K, an optimizer step has seen each of the K tasks once.

    Args:
        until: An epoch gives every task as many turns as the longest one has batches, or the shortest.

    Raises:
        ValueError: If ``until`` is neither ``"longest"`` nor ``"shortest"``.

    Example:
        >>> list(RoundRobin().order({"a": 2, "b": 1}, 4, torch.Generator()))
        [('a',), ('b',), ('a',), ('b',)]
        >>> RoundRobin().steps({"a": 10, "b": 4}), RoundRobin("shortest").steps({"a": 10, "b": 4})
        (20, 8)
    """

    until: Until = "longest"

    def __post_init__(self) -> None:
        _check_until(self)

    def steps(self, sizes: Sizes) -> int:
        """Return K times the batches of the longest task, or of the shortest."""
        return len(sizes) * _TURNS_UNTIL[self.until](_known(sizes, self))

    def order(self, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[tuple[str, ...]]:
        """Return one task after the other."""
        return itertools.islice(itertools.cycle((task,) for task in sizes), steps)


@dataclass(frozen=True)
class Drawn(Mixing):
    r"""Draws one task for each step with shares :math:`p_k` that sum to 1; a base class.

    An epoch of S steps has :math:`\lfloor S p_k \rfloor` or :math:`\lceil S p_k \rceil` steps of task k, S p_k in the
    mean over epochs, in random order: systematic sampling (Madow, 1949), which no small task falls out of and which
    varies less than independent draws.
    """

    @abstractmethod
    def weights(self, sizes: Sizes) -> list[float]:
        """Return a number proportional to each task's share."""

    def steps(self, sizes: Sizes) -> int:
        """Return the batches of all tasks together."""
        return sum(_known(sizes, self))

    def order(self, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[tuple[str, ...]]:
        """Return the epoch's tasks in random order."""
        weights = self.weights(sizes)
        offset = float(torch.rand((), generator=generator, dtype=torch.float64))
        # Of the points offset, offset + 1, ..., those below a bound; rounded, so that a whole number is one.
        step = steps / sum(weights)
        bounds = [round(step * total, 9) for total in itertools.accumulate(weights)]
        below = [max(0, math.ceil(bound - offset)) for bound in bounds]
        counts = torch.tensor([after - before for before, after in itertools.pairwise([0, *below])])
        drawn = torch.arange(len(weights)).repeat_interleave(counts)
        singles = [(task,) for task in sizes]
        return (singles[index] for index in drawn[torch.randperm(len(drawn), generator=generator)].tolist())


@dataclass(frozen=True)
class Proportional(Drawn):
    r"""Takes a batch from one task in each step, drawn in proportion to its size or to a power of it.

    .. math:: p_k = \frac{m_k^{1/T}}{\sum_j m_j^{1/T}}

    with m_k the batches that a pass over task k has. At T = 1 an epoch is exactly one pass over every task; the higher
    T, the more alike the shares, at infinity the same for all.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: If the temperature is not above 0.

    Source: Arivazhagan et al., Massively Multilingual Neural Machine Translation in the Wild, 2019, arXiv:1907.05019;
    Raffel et al. (T5), 2020, arXiv:1910.10683, section 3.5.2.

    Example:
        >>> Proportional().weights({"a": 16, "b": 4}), Proportional(temperature=2).weights({"a": 16, "b": 4})
        ([16.0, 4.0], [4.0, 2.0])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"Proportional(temperature={self.temperature}) must be above 0: 1 for shares in proportion to size, "
                "more for shares that are more alike."
            )

    def weights(self, sizes: Sizes) -> list[float]:
        """Return the sizes to the power 1/T."""
        return [float(size) ** (1 / self.temperature) for size in _known(sizes, self, at_all=True)]


@dataclass(frozen=True)
class Ratios(Drawn):
    """Takes a batch from one task in each step, drawn in fixed proportions.

    Args:
        ratios: ``{task: number}`` for every task; they need not sum to 1. A task with 0 is left out, for some epochs of
            a :class:`Schedule` for instance.

    Raises:
        TypeError: If ``ratios`` is no mapping, or empty.
        ValueError: If a number is negative or not finite, or none is above 0.

    Example:
        >>> tasks = list(Ratios({"a": 3, "b": 1}).order({"a": 9, "b": 9}, 8, torch.Generator()))
        >>> tasks.count(("a",)), tasks.count(("b",))
        (6, 2)
    """

    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.ratios or not hasattr(self.ratios, "items"):
            raise TypeError(f"Ratios must get {{task: number}}, found {self.ratios!r}.")
        for task, ratio in self.ratios.items():
            if not 0 <= ratio < math.inf:
                raise ValueError(f"Ratios gives {task!r} the ratio {ratio}; it must be a finite number of at least 0.")
        if not any(self.ratios.values()):
            raise ValueError(f"Ratios({dict(self.ratios)}) draws no task at all; give one a ratio above 0.")

    def check(self, tasks: Sequence[str]) -> None:
        """Refuse ratios that do not name the tasks of the data."""
        if set(self.ratios) != set(tasks):
            raise ValueError(
                f"Ratios names the tasks {sorted(self.ratios)}, the training data has {sorted(tasks)}; give each of "
                "these a ratio, 0 to leave it out."
            )

    def weights(self, sizes: Sizes) -> list[float]:
        """Return the ratios in the order of the data."""
        return [float(self.ratios[task]) for task in sizes]


_TURNS_UNTIL: dict[Until, Callable[[list[int]], int]] = {"longest": max, "shortest": min}


def _check_until(mode: Joint | RoundRobin) -> None:
    if mode.until not in _TURNS_UNTIL:
        raise ValueError(f"{type(mode).__name__}(until={mode.until!r}) must be 'longest' or 'shortest'.")


def _known(sizes: Sizes, mode: Mixing, *, at_all: bool = False) -> list[int]:
    """The sizes, refused where one is needed and unknown."""
    unknown = [task for task, size in sizes.items() if size is None]
    if unknown and at_all:
        raise ValueError(
            f"{type(mode).__name__} draws tasks by their sizes, and the training data of {unknown} have no length. "
            "Give the dataset a __len__, or use Ratios(ratios={task: number}) and steps_per_epoch."
        )
    if unknown:
        raise ValueError(
            f"The training data of {unknown} have no length to end an epoch of {type(mode).__name__} by; set "
            "steps_per_epoch=..., or give the dataset a __len__."
        )
    return [size for size in sizes.values() if size is not None]
