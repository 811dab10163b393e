"""Reads what a user gives for each task: a dataset, or a loader, which is taken apart where that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
)

from lightning_mtl.data.order import Draw, permutations
from lightning_mtl.data.samplers import distributed_sampler, known_order

BatchSizes: TypeAlias = int | Mapping[str, int | None] | None

# What a DataLoader does with the batches that it is told to load; all of them are attributes of it, too.
OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


@dataclass(frozen=True)
class Source:
    """Holds one task's data in one stage; the base class of the three forms that data may have."""

    task: str
    stage: str

    @property
    def name(self) -> str:
        """Return the name of the data in errors."""
        return f"{self.stage}[{self.task!r}]"


@dataclass(frozen=True)
class DatasetSource(Source):
    """Holds a map-style dataset, whose order this package decides; without a batch size its elements are batches."""

    dataset: Any
    batch_size: int | None
    options: Mapping[str, Any]
    drop_last: bool = False
    shuffle: bool = True
    whole_batches: bool = False  # the dataset is asked for a list of indices at once
    draw: Draw = permutations
    draws: int | None = None  # samples of a pass, where they are not those of the dataset


@dataclass(frozen=True)
class IterableSource(Source):
    """Holds an iterable dataset; without a batch size its elements are batches."""

    samples: IterableDataset[Any]
    batch_size: int | None
    options: Mapping[str, Any]
    drop_last: bool = False

    @property
    def num_workers(self) -> int:
        """Return the number of worker processes that load it."""
        return int(self.options.get("num_workers", 0))


@dataclass(frozen=True)
class LoaderSource(Source):
    """Holds a loader of ready-made batches, used as it is."""

    loader: Iterable[Any]


def read_source(
    task: str,
    stage: str,
    given: Any,  # noqa: ANN401 - told apart here
    batch_size: BatchSizes,
    options: Mapping[str, Any],
    drop_last: bool = False,
    ranks: int | None = None,
) -> DatasetSource | IterableSource | LoaderSource:
    """Tell a dataset from a loader, and a loader that is a dataset and settings from one to be used as it is.

    Args:
        task: Its task.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        given: What the user gave.
        batch_size: That of datasets; a loader brings its own.
        options: Arguments of DataLoader for datasets; a loader brings its own.
        drop_last: Whether datasets leave an incomplete batch out in training; a loader brings its own.
        ranks: How many ranks there are; None before that is known.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is empty, a dataset has no batch size or makes batches already, or a loader does not give
            each sample once where that is wanted.
    """
    drop_last = drop_last and stage == "train"
    if isinstance(given, DataLoader):
        return _of_loader(task, stage, given, ranks)
    if inner_loader(given) is not None:
        return _complete(LoaderSource(task, stage, given))
    if isinstance(given, IterableDataset):
        samples = IterableSource(task, stage, given, _needed(batch_size, task), options, drop_last)
        return _batched_once(samples, f"batch_size={{{task!r}: None}}")
    if isinstance(given, Dataset) or (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        _size(given, f"{stage}[{task!r}]")
        return DatasetSource(task, stage, given, _needed(batch_size, task), options, drop_last)
    if isinstance(given, Iterable) and not isinstance(given, Iterator):
        return LoaderSource(task, stage, given)
    wanted = "a dataset, or a loader that can be read again and again"
    raise TypeError(f"{stage}[{task!r}] must be {wanted}; found {type(given).__name__}.")


def inner_loader(data: object) -> DataLoader[Any] | None:
    """Return the DataLoader that data are, or that a webdataset pipeline (``WebLoader``) begins with."""
    if isinstance(data, DataLoader):
        return data
    stages = getattr(data, "pipeline", None)
    first = stages[0] if isinstance(stages, list) and stages else None
    return first if isinstance(first, DataLoader) else None


def _needed(batch_size: BatchSizes, task: str) -> int | None:
    if not isinstance(batch_size, Mapping):
        return batch_size
    if task not in batch_size:
        raise ValueError(
            f"batch_size has no entry for the task {task!r}; give it one, or one number for all tasks, or None if its "
            "elements are batches."
        )
    return batch_size[task]


def _size(sized: Any, name: str) -> int:  # noqa: ANN401 - any dataset
    """The number of samples, which must be known and above 0."""
    try:
        size = len(sized)
    except TypeError as error:
        raise TypeError(
            f"{name} is a {type(sized).__name__} without __len__; give it one, or make it an IterableDataset."
        ) from error
    if size == 0:
        raise ValueError(f"{name} is empty: {type(sized).__name__} has no sample. Leave the task out, or fill it.")
    return size


def _batched_once(source: IterableSource, fix: str) -> IterableSource:
    """Refuse to make batches of a webdataset pipeline's batches."""
    names = [getattr(getattr(stage, "f", None), "__name__", "") for stage in getattr(source.samples, "pipeline", ())]
    last = next((name for name in reversed(names) if name in ("_batched", "_unbatched", "_unlisted")), None)
    if last == "_batched" and source.batch_size is not None:
        raise ValueError(
            f"{source.name} makes batches itself ({type(source.samples).__name__}.batched), of which there would be "
            f"batches of {source.batch_size}. Say {fix}, or leave .batched out."
        )
    return source


def _of_loader(
    task: str, stage: str, loader: DataLoader[Any], ranks: int | None
) -> DatasetSource | IterableSource | LoaderSource:
    """Take a plain loader apart, so that ranks and resuming are served as for a dataset; leave others as they are."""
    options = {option: getattr(loader, option) for option in OPTIONS}
    as_it_is, training = LoaderSource(task, stage, loader), stage == "train"
    plain = type(loader) is DataLoader
    if isinstance(loader.dataset, IterableDataset):
        drop_last = loader.drop_last and training
        samples = IterableSource(task, stage, loader.dataset, loader.batch_size, options, drop_last)
        samples = _batched_once(samples, f"{type(loader).__name__}(..., batch_size=None)")
        return samples if plain else _complete(as_it_is)
    size = _size(loader.dataset, as_it_is.name)
    whole_batches = loader.batch_size is None and type(loader.sampler) is BatchSampler
    batches: Any = loader.sampler if whole_batches else loader.batch_sampler
    single = batches is None  # the dataset's elements are batches
    if not plain or not (single or type(batches) is BatchSampler):
        return _complete(as_it_is)
    order = known_order(loader.sampler if single else batches.sampler, ranks)
    if order is None:
        return _complete(as_it_is)
    draws = size if order.draws is None else order.draws
    if not training and (order.draw is not permutations or draws != size):
        raise _draws(as_it_is)
    dataset = loader.dataset if order.indices is None else Subset(loader.dataset, order.indices)
    _size(dataset, as_it_is.name)
    return DatasetSource(
        task,
        stage,
        dataset,
        None if single else batches.batch_size,
        options,
        not single and batches.drop_last and training,
        order.shuffle,
        whole_batches,
        order.draw,
        order.draws,
    )


def _complete(source: LoaderSource) -> LoaderSource:
    """Refuse an evaluation that leaves samples out, or repeats some for ranks to have as many as others."""
    loader = inner_loader(source.loader)
    if source.stage == "train" or loader is None:
        return source
    if loader.drop_last:
        raise ValueError(
            f"{source.name} is a {type(source.loader).__name__} with drop_last=True, which leaves samples out; "
            "evaluation takes each sample once. Use drop_last=False there."
        )
    if getattr(loader.sampler, "replacement", False):
        raise _draws(source)
    sampler = distributed_sampler(loader)
    if isinstance(sampler, DistributedSampler) and len(loader.dataset) % sampler.num_replicas:  # type: ignore[arg-type]
        raise ValueError(
            f"{source.name} divides {len(loader.dataset)} samples over {sampler.num_replicas} ranks by a "  # type: ignore[arg-type]
            f"{type(sampler).__name__}, which repeats samples or drops some; evaluation takes each sample once. Give "
            "the dataset itself, or a DataLoader without a sampler."
        )
    return source


def _draws(source: Source) -> ValueError:
    return ValueError(
        f"{source.name} is a loader that draws samples at random, some of them twice or never; evaluation takes each "
        "sample once. Give the dataset itself, or torch.utils.data.Subset of it."
    )
