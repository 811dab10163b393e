"""What the samplers of a user's loader do, where they are torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_mtl.data.order import Draw, permutations


@dataclass(frozen=True)
class KnownOrder:
    """Says in other words what a sampler does, so that ranks can divide it and a resumed run goes on in it.

    Attributes:
        shuffle: Whether the order is random.
        draw: Draws the indices of a pass.
        draws: How many they are; None, as many as there are samples.
        indices: The samples that are drawn from; None, all.
    """

    shuffle: bool
    draw: Draw = permutations
    draws: int | None = None
    indices: list[int] | None = None


def known_order(sampler: object, ranks: int | None) -> KnownOrder | None:
    """Return what a sampler of torch's own does; None for any other, and for one of another number of ranks.

    Example:
        >>> known_order(SequentialSampler([1, 2]), 1)
        KnownOrder(shuffle=False, draw=<function permutations at 0x...>, draws=None, indices=None)
    """
    if type(sampler) is SequentialSampler:
        return KnownOrder(shuffle=False)
    # The padding, by which all ranks have as many samples, is left out.
    if type(sampler) is DistributedSampler and ranks in (None, sampler.num_replicas):
        return KnownOrder(sampler.shuffle)
    if type(sampler) is SubsetRandomSampler:
        return KnownOrder(shuffle=True, indices=[int(index) for index in sampler.indices])
    if type(sampler) is WeightedRandomSampler:
        return KnownOrder(True, _weighted(sampler), sampler.num_samples)
    if type(sampler) is RandomSampler:
        return KnownOrder(True, _with_replacement if sampler.replacement else permutations, sampler.num_samples)
    return None


def _with_replacement(size: int, number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(size, (number,), generator=generator)


def _weighted(sampler: WeightedRandomSampler) -> Draw:
    def draw(size: int, number: int, generator: torch.Generator) -> torch.Tensor:
        return torch.multinomial(sampler.weights, number, sampler.replacement, generator=generator)

    return draw


def has_plain_samplers(loader: DataLoader[Any]) -> bool:
    """Return whether the samplers of a loader are torch's or torchdata's."""
    parts = [part for part in (loader.batch_sampler, loader.sampler) if part is not None]
    return all(type(part).__module__.partition(".")[0] in ("torch", "torchdata") for part in parts)


def distributed_sampler(loader: DataLoader[Any]) -> Any:  # noqa: ANN401 - any class that follows torch's convention
    """Return the sampler or batch sampler of a loader that says for how many ranks it is; None if none does."""
    batches = loader.batch_sampler
    for part in (batches, loader.sampler, getattr(batches, "sampler", None)):
        if isinstance(getattr(part, "num_replicas", None), int):
            return part
    return None
