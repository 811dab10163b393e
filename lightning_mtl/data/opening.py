"""Opens a stream of each form that a task's data may have."""

from __future__ import annotations

import functools
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_mtl.data.division import Division, ShardIterables, check_drawn_once, divide
from lightning_mtl.data.iterables import BeginWorker, EveryNth, ResumableSamples, is_stateful
from lightning_mtl.data.order import Shard, generator_for
from lightning_mtl.data.passing import PassingStream
from lightning_mtl.data.sources import DatasetSource, IterableSource, LoaderSource, inner_loader
from lightning_mtl.data.streams import OrderedStream, Stream
from lightning_mtl.distributed import of_each


def open_stream(
    source: DatasetSource | IterableSource | LoaderSource,
    shard: Shard,
    seed: int,
    *,
    shuffle: bool,
    shard_iterables: ShardIterables,
) -> Stream:
    """Open the stream of a source for a rank.

    Raises:
        ValueError: If the ranks or workers cannot divide the source, or it has no batch.
    """
    if isinstance(source, DatasetSource):
        return OrderedStream(source, shard, seed, shuffle=shuffle)
    division = divide(source, shard, shard_iterables)
    if isinstance(source, IterableSource):
        return _samples(source, shard, seed, division)
    if source.stage != "train":
        check_drawn_once(source, shard, division, of_each)
    stateful = source.loader if is_stateful(source.loader) else None
    loader = inner_loader(source.loader)
    iterable = loader is not None and isinstance(loader.dataset, IterableDataset)
    batches = length_if_known(source.loader)
    # How many incomplete batches workers leave of an iterable dataset that divides itself is not known; evaluation
    # has to end where the data do.
    if batches is not None and iterable and source.stage != "train":
        batches = None
    if batches is not None and division.ranks:
        batches = -(-batches // shard.ranks)
    workers = loader.num_workers if loader is not None and iterable else 0
    return PassingStream(source.name, source.loader, batches, stateful, division=division, shard=shard, workers=workers)


def _samples(source: IterableSource, shard: Shard, seed: int, division: Division) -> PassingStream:
    """A stream of an iterable dataset."""
    samples, workers = source.samples, source.num_workers
    own = shard if division.ranks else Shard()
    options = {**source.options, "persistent_workers": False}  # a new pass reaches workers with a new copy
    # A dataset's state is at hand in this process alone, not in workers'.
    resumable = ResumableSamples(samples, own) if is_stateful(samples) and workers == 0 else None
    reader: EveryNth | None = resumable
    if resumable is None and (own.ranks > 1 or (division.workers and workers > 1)):
        reader = EveryNth(samples, own, over_workers=division.workers is True)
        options["worker_init_fn"] = BeginWorker(options.get("worker_init_fn"))
    # Ranks that share one sequence of samples need it in one order, which a dataset may draw from its worker's seed.
    words = (source.task,) if own.ranks > 1 else (source.task, shard.rank)
    generator = functools.partial(_generator, seed, words)
    loader: DataLoader[Any] = DataLoader(
        samples if reader is None else reader,
        batch_size=source.batch_size,
        drop_last=source.drop_last and source.batch_size is not None,
        generator=generator(0),
        **options,
    )
    return PassingStream(
        source.name,
        loader,
        _batches_of_a_pass(source, shard, division),
        resumable,
        division=division,
        shard=shard,
        reader=reader,
        workers=0 if division.workers else workers,
        generator=generator,
    )


def _generator(seed: int, words: tuple[str | int, ...], number: int) -> torch.Generator:
    return generator_for(seed, "workers", *words, number)


def _batches_of_a_pass(source: IterableSource, shard: Shard, division: Division) -> int | None:
    """The batches of the rank that has the most; each reader ends its share with a batch of its own.

    Raises:
        ValueError: If a rank has none.
    """
    size = length_if_known(source.samples)
    if size == 0:
        raise ValueError(f"{source.name} is empty: {type(source.samples).__name__} has no sample. Leave the task out.")
    if size is None or (shard.ranks > 1 and not division.ranks):
        return None  # nobody knows whether the length of a dataset that divides itself is the whole or a share
    workers, training = max(1, source.num_workers), source.stage == "train"
    if not division.workers and workers > 1:
        if not training:
            return None  # the dataset knows how many samples each worker has, and only where it ends is certain
        workers = 1  # as torch has it, where each worker may have an incomplete batch more
    readers, batch_size = shard.ranks * workers, source.batch_size or 1
    shares = [-(-max(0, size - reader) // readers) for reader in range(readers)]
    counts = [share // batch_size if source.drop_last else -(-share // batch_size) for share in shares]
    of_ranks = [sum(counts[rank * workers : (rank + 1) * workers]) for rank in range(shard.ranks)]
    if training and not min(of_ranks):
        raise ValueError(
            f"{source.name} has {size} samples, too few for a batch of {batch_size} on each of {shard.ranks} ranks "
            f"with {source.num_workers} workers{' and drop_last=True' if source.drop_last else ''}. Use a smaller "
            "batch_size, fewer workers or drop_last=False."
        )
    return max(of_ranks)


def length_if_known(data: object) -> int | None:
    """Return the length of data that have one."""
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a loader has __len__, whether or not its dataset has
        return None
