"""The order in which a rank reads a dataset's samples: a function of seed, pass and position only."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


def generator_for(seed: int, *words: int | str) -> torch.Generator:
    """Make a generator for one purpose: the same on every rank and machine, different from that of other words."""
    entropy = [seed, *(zlib.crc32(word.encode()) if isinstance(word, str) else word for word in words)]
    low, high = np.random.SeedSequence(entropy).generate_state(2).tolist()
    return torch.Generator().manual_seed(low + (high << 32))


Draw = Callable[[int, int, torch.Generator], torch.Tensor]
"""Draws a pass's indices: of how many samples, how many, by which random numbers."""


def permutations(size: int, number: int, generator: torch.Generator) -> torch.Tensor:
    """Draw every index once, and again where more are asked for, as ``RandomSampler`` does."""
    drawn = [torch.randperm(size, generator=generator) for _ in range(-(-number // size))]
    return torch.cat(drawn)[:number]


class DataPosition(NamedTuple):
    """Counts what all ranks together have seen of a dataset: whole passes, and samples of the current one."""

    passes: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Shard:
    """Holds this process's rank, and the number of ranks with data of their own."""

    rank: int = 0
    ranks: int = 1


@dataclass
class PassOrder:
    """Orders each pass over a dataset of n samples anew, and divides it into global batches of B x R samples.

    Rank r of R takes every R-th sample of a global batch, from the r-th on: together they see what one process with
    batch size B x R would, no sample twice, and all take the same number of batches. A pass's last global batch may be
    smaller, on some ranks by one sample, or empty there.

    Attributes:
        draw: Draws the indices of a pass, where it is shuffled.
        population: The samples that are drawn from; None, as many as a pass has.
        global_batch: B x R.
        used: The samples of a pass that are in a batch.
        batches: The global batches of a pass.
    """

    size: int
    batch_size: int
    shard: Shard
    seed: int
    name: str
    shuffle: bool
    drop_last: bool = False
    draw: Draw = permutations
    population: int | None = None
    global_batch: int = field(init=False)
    used: int = field(init=False)
    batches: int = field(init=False)
    _permutation: np.ndarray[Any, np.dtype[np.int64]] = field(init=False, repr=False)
    _permuted_pass: int = field(init=False, default=-1, repr=False)

    def __post_init__(self) -> None:
        self.global_batch = self.batch_size * self.shard.ranks
        self.used = self.size - self.size % self.global_batch if self.drop_last else self.size
        self.batches = -(-self.used // self.global_batch)

    def after(self, position: DataPosition) -> DataPosition:
        """Return where the next global batch begins."""
        samples = position.samples + self.global_batch
        return DataPosition(position.passes, samples) if samples < self.used else DataPosition(position.passes + 1)

    def share(self, position: DataPosition) -> int:
        """Return how many samples of the global batch at this position belong to this rank."""
        return len(self._share(position))

    def indices(self, position: DataPosition) -> list[int]:
        """Return this rank's samples of the global batch at this position."""
        share = self._share(position)
        if not self.shuffle:
            return list(share)
        if self._permuted_pass != position.passes:
            generator = generator_for(self.seed, "order", self.name, position.passes)
            population = self.size if self.population is None else self.population
            self._permutation = self.draw(population, self.size, generator).numpy()
            self._permuted_pass = position.passes
        found: list[int] = self._permutation[share.start : share.stop : share.step].tolist()
        return found

    def _share(self, position: DataPosition) -> range:
        end = min(position.samples + self.global_batch, self.used)
        return range(min(position.samples + self.shard.rank, end), end, self.shard.ranks)


class Batches(Sampler[list[int]]):
    """Yields this rank's batches from a position on, endlessly or to the end of the pass; empty ones are left out."""

    def __init__(self, order: PassOrder, start: DataPosition, *, one_pass: bool = False) -> None:
        self.order = order
        self.start = start
        self.one_pass = one_pass

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while not self.one_pass or position.passes == self.start.passes:
            if indices := self.order.indices(position):
                yield indices
            position = self.order.after(position)


class Singles(Sampler[int]):
    """Yields the indices of batches of one sample, without the lists around them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[int]:
        return (index for (index,) in self.batches)
