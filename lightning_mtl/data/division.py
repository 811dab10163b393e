"""Who divides samples over ranks and workers: the data themselves, or the data module.

Map-style datasets are always divided by the data module. For the others, what is known of the data decides, then the
user's answer; without either, data that several would read are refused.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_mtl.data.order import Shard
from lightning_mtl.data.samplers import distributed_sampler, has_plain_samplers
from lightning_mtl.data.sources import IterableSource, LoaderSource, Source, inner_loader

ShardIterables = bool | Literal["ranks", "workers"] | None


class Division(NamedTuple):
    """Says of ranks and of workers whether the data module divides the data over them; None where nobody knows."""

    ranks: bool | None
    workers: bool | None


ANSWERS: Mapping[ShardIterables, Division] = {
    None: Division(None, None),
    True: Division(ranks=True, workers=True),
    False: Division(ranks=False, workers=False),
    "ranks": Division(ranks=True, workers=False),
    "workers": Division(ranks=False, workers=True),
}


def divide(source: IterableSource | LoaderSource, shard: Shard, answer: ShardIterables) -> Division:
    """Decide who divides iterable data, or a loader's batches.

    Raises:
        ValueError: If nobody knows, or what is known forbids it.
    """
    known, said = _known(source, shard), ANSWERS[answer]
    ranks = known.ranks if known.ranks is not None else said.ranks
    workers = known.workers if known.workers is not None else said.workers
    number = _workers_of(source)
    loader = inner_loader(source.loader) if isinstance(source, LoaderSource) else None
    if (ranks is None and shard.ranks > 1) or (workers is None and number > 1):
        raise ValueError(_unanswered(source, shard, number))
    if workers and number > 1 and isinstance(source, LoaderSource):
        raise ValueError(
            f"{source.name} is a loader whose {number} workers would each read all of an iterable dataset. Give the "
            "dataset itself or a plain DataLoader, or shard_iterables=False if the dataset tells workers apart."
        )
    if ranks and shard.ranks > 1 and getattr(loader, "in_order", True) is False:
        raise ValueError(
            f"{source.name} is a loader with in_order=False, whose batches come in another order on each rank: they "
            "cannot be divided. Use in_order=True, or a sampler that divides them."
        )
    return Division(bool(ranks), bool(workers))


def _unanswered(source: IterableSource | LoaderSource, shard: Shard, workers: int) -> str:
    if isinstance(source, IterableSource) or workers > 1:
        return (
            f"{source.name} is an iterable dataset, read by {shard.ranks} ranks with {workers} workers each. Set "
            "shard_iterables=True to give each of them every n-th sample, or shard_iterables=False if the dataset "
            'itself tells ranks and workers (get_worker_info) apart, or "ranks" or "workers" for what is left.'
        )
    return (
        f"{source.name} is a loader with an order of its own, which {shard.ranks} ranks would all read alike. Give the "
        "dataset itself or a DataLoader without a sampler of your own, or set shard_iterables=False if the loader "
        "divides samples over ranks itself, or True to give each rank every n-th batch, where all ranks draw alike."
    )


def _workers_of(source: IterableSource | LoaderSource) -> int:
    """The workers that each have a copy of an iterable dataset."""
    if isinstance(source, IterableSource):
        return source.num_workers
    loader = inner_loader(source.loader)
    return loader.num_workers if loader is not None and isinstance(loader.dataset, IterableDataset) else 0


# What is known of the data


def _known(source: IterableSource | LoaderSource, shard: Shard) -> Division:
    if isinstance(source, IterableSource):
        return _of_dataset(source.samples, source, shard)
    loader = inner_loader(source.loader)
    if loader is None:
        return Division(None, None)
    if isinstance(loader.dataset, IterableDataset):
        return _of_dataset(loader.dataset, source, shard)
    sampler = distributed_sampler(loader)
    if sampler is None:
        return Division(None, workers=False)
    _check_parts(source.name, type(sampler).__name__, sampler.num_replicas, shard)
    return Division(ranks=False, workers=False)


def _of_dataset(dataset: Any, source: Source, shard: Shard) -> Division:  # noqa: ANN401
    """Hugging Face's and webdataset's datasets are recognized by what they hold, and neither is imported."""
    if _is_from(dataset, "datasets.iterable_dataset") and hasattr(dataset, "_distributed"):
        split = dataset._distributed  # by split_dataset_by_node
        if split is not None:
            _check_parts(source.name, "split_dataset_by_node", split.world_size, shard)
        return Division(ranks=split is None, workers=False)
    stages = getattr(dataset, "pipeline", None)
    if not _is_from(dataset, "webdataset") or not isinstance(stages, list) or not stages:
        return Division(None, None)
    if type(stages[0]).__name__ == "ResampledShards":
        # Each reader draws shards of its own.
        if source.stage != "train":
            raise ValueError(
                f"{source.name} is a {type(dataset).__name__} that draws shards at random; evaluation takes each "
                "sample once. Use resampled=False there."
            )
        return Division(ranks=False, workers=False)
    functions = [stage.func if isinstance(stage, functools.partial) else stage for stage in stages]
    names = {getattr(function, "__name__", "") for function in functions if _is_webdatasets(function)}
    if shard.ranks > 1 and "single_node_only" in names:
        raise ValueError(
            f"{source.name} is a {type(dataset).__name__} for one rank, there are {shard.ranks}. Make it with "
            "nodesplitter=webdataset.split_by_node, or with nodesplitter=None, and each rank keeps every n-th sample."
        )
    # What is not webdataset's own may divide, too.
    rest = True if all(map(_is_webdatasets, functions)) else None
    return Division(
        ranks=False if "split_by_node" in names else rest, workers=False if "split_by_worker" in names else rest
    )


def _is_from(data: object, module: str) -> bool:
    return any(cls.__module__ == module or cls.__module__.startswith(f"{module}.") for cls in type(data).__mro__)


def _is_webdatasets(stage: object) -> bool:
    module = getattr(stage, "__module__", None) or type(stage).__module__
    return module.partition(".")[0] == "webdataset"


def _check_parts(name: str, who: str, parts: int, shard: Shard) -> None:
    if parts != shard.ranks > 1:
        raise ValueError(
            f"{name} is divided by {who} for {parts} ranks, there are {shard.ranks}; divide it for as many, or not at "
            "all."
        )


# What is left to see when it is too late to ask


def check_drawn_once(
    source: LoaderSource, shard: Shard, division: Division, gather: Callable[[Any], list[Any]]
) -> None:
    """Refuse an evaluation in which samplers of one's own give two ranks the same sample; all ranks call this."""
    loader = source.loader
    if shard.ranks == 1 or division.ranks or not isinstance(loader, DataLoader):
        return
    # The first has no indices, the second draws them of a dataset that is this rank's own, the third ones are known.
    if isinstance(loader.dataset, IterableDataset) or has_plain_samplers(loader):
        return
    if isinstance(distributed_sampler(loader), DistributedSampler):
        return
    batches = loader.batch_sampler
    drawn = list(itertools.chain.from_iterable(batches) if batches is not None else loader.sampler)
    often = Counter(itertools.chain.from_iterable(gather(drawn)))
    if repeated := [index for index, times in often.items() if times > 1]:
        raise ValueError(
            f"{source.name} reads {len(repeated)} of {len(often)} samples more than once, sample {repeated[0]} for "
            f"one, on {shard.ranks} ranks; evaluation takes each sample once. Give the dataset itself, or a sampler "
            "that does not repeat samples."
        )
