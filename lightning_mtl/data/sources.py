"""Reads what a user gives for each task, a dataset or a loader, and refuses wrong names and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_mtl.data.mixing import Mixing
from lightning_mtl.data.order import Shard

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
    """Holds a map-style dataset, whose order this package decides."""

    dataset: Any
    batch_size: int
    options: Mapping[str, Any]
    drop_last: bool = False
    shuffle: bool = True
    whole_batches: bool = False  # the dataset is asked for a list of indices at once


@dataclass(frozen=True)
class IterableSource(Source):
    """Holds an iterable dataset."""

    samples: IterableDataset[Any]
    batch_size: int
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
    batch_size: int | None,
    options: Mapping[str, Any],
    drop_last: bool = False,
) -> DatasetSource | IterableSource | LoaderSource:
    """Tell a dataset from a loader, and a loader that is a dataset and settings from one to be used as it is.

    Args:
        task: Its task.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        given: What the user gave.
        batch_size: That of datasets; a loader brings its own.
        options: Arguments of DataLoader for datasets; a loader brings its own.
        drop_last: Whether datasets leave an incomplete batch out; a loader brings its own.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is empty, or a dataset has no batch size.
    """
    if isinstance(given, DataLoader):
        return _of_loader(task, stage, given)
    if isinstance(given, IterableDataset):
        return IterableSource(task, stage, given, _needed(batch_size, task), options, drop_last)
    if isinstance(given, Dataset) or (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        _size(given, f"{stage}[{task!r}]")
        return DatasetSource(task, stage, given, _needed(batch_size, task), options, drop_last)
    if isinstance(given, Iterable) and not isinstance(given, Iterator):
        return LoaderSource(task, stage, given)
    wanted = "a dataset, or a loader that can be read again and again"
    raise TypeError(f"{stage}[{task!r}] must be {wanted}; found {type(given).__name__}.")


def _needed(batch_size: int | None, task: str) -> int:
    if batch_size is None:
        raise ValueError(f"batch_size has no entry for the task {task!r}; give it one, or one number for all tasks.")
    return batch_size


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


def _of_loader(task: str, stage: str, loader: DataLoader[Any]) -> DatasetSource | IterableSource | LoaderSource:
    """Take a plain loader apart, so that ranks and resuming are served as for a dataset; leave others as they are."""
    options = {option: getattr(loader, option) for option in OPTIONS}
    as_it_is = LoaderSource(task, stage, loader)
    plain = type(loader) is DataLoader
    if isinstance(loader.dataset, IterableDataset):
        if not plain or loader.batch_size is None:
            return as_it_is
        return IterableSource(task, stage, loader.dataset, loader.batch_size, options, loader.drop_last)
    size = _size(loader.dataset, as_it_is.name)
    whole_batches = loader.batch_size is None and type(loader.sampler) is BatchSampler
    batches = loader.sampler if whole_batches else loader.batch_sampler
    if not plain or type(batches) is not BatchSampler:
        return as_it_is
    sampler = batches.sampler
    drawn = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size
    if not drawn and type(sampler) is not SequentialSampler:
        return as_it_is
    return DatasetSource(
        task, stage, loader.dataset, batches.batch_size, options, batches.drop_last, drawn, whole_batches
    )


def check_shards(source: Source, shard: Shard, shard_iterables: bool | None) -> None:
    """Refuse data that several ranks or workers would read twice.

    Raises:
        ValueError: If nobody said how to divide an iterable dataset, or a loader's own sampler does not divide it.
    """
    if isinstance(source, IterableSource) and shard_iterables is None and shard.ranks * max(1, source.num_workers) > 1:
        raise ValueError(
            f"{source.name} is an iterable dataset, read by {shard.ranks} ranks with {source.num_workers} workers "
            "each. Set shard_iterables=True to give each of them every n-th sample, or shard_iterables=False if the "
            "dataset itself tells ranks and workers (get_worker_info) apart."
        )
    if isinstance(source, LoaderSource) and shard.ranks > 1:
        if isinstance(getattr(source.loader, "sampler", None), DistributedSampler):
            return
        raise ValueError(
            f"{source.name} is a loader with an order of its own, which {shard.ranks} ranks would all read alike. Give "
            "the dataset itself, a DataLoader without a sampler of your own, or one with a DistributedSampler."
        )


def number_for_task(value: int | Mapping[str, int], task: str) -> int | None:
    """Return a task's number from one number for all tasks or from ``{task: number}``.

    Example:
        >>> number_for_task(32, "a"), number_for_task({"a": 16}, "a"), number_for_task({"a": 16}, "b")
        (32, 16, None)
    """
    return value.get(task) if isinstance(value, Mapping) else value


def check_data_arguments(
    given: Mapping[str, Any],
    mixing: object,
    batch_size: int | Mapping[str, int],
    num_workers: int | Mapping[str, int],
    steps_per_epoch: int | None,
    seed: int | None,
) -> None:
    """Check the arguments of :class:`~lightning_mtl.data.MultiTaskDataModule`, the data themselves aside."""
    for stage, data in given.items():
        if data is None:
            continue
        if not isinstance(data, Mapping) or not data:
            raise TypeError(f"{stage} must be {{task: dataset or loader}} with an entry or more, found {data!r}.")
        for task in data:
            if not isinstance(task, str):
                raise TypeError(f"{stage} names the task {task!r}, which is no string.")
    tasks = dict.fromkeys(task for data in given.values() if data for task in data)
    train = given["train"]
    for stage, data in given.items():
        if train is not None and data is not None and (unknown := [task for task in data if task not in train]):
            raise ValueError(
                f"{stage} has data of {unknown}, which train does not know: its tasks are {list(train)}. Name them "
                "alike, or evaluate other tasks with a data module of their own."
            )
    _check_numbers("batch_size", batch_size, tasks, 1)
    _check_numbers("num_workers", num_workers, tasks, 0)
    if steps_per_epoch is not None:
        _check_number("steps_per_epoch", steps_per_epoch, 1)
    if seed is not None:
        _check_number("seed", seed, 0)
    if not isinstance(mixing, Mixing):
        raise TypeError(
            f"mixing must be Joint(), RoundRobin(), Proportional(), Ratios({{task: number}}) or Schedule({{epoch: "
            f"mode}}) from lightning_mtl.data, found {mixing!r}."
        )
    if train is not None:
        mixing.check(list(train))


def _check_numbers(name: str, value: int | Mapping[str, int], tasks: Mapping[str, None], least: int) -> None:
    if not isinstance(value, Mapping):
        _check_number(name, value, least)
        return
    if tasks and (unknown := [task for task in value if task not in tasks]):
        raise ValueError(f"{name} names {unknown}, but the tasks of the data are {list(tasks)}.")
    for task, number in value.items():
        _check_number(f"{name}[{task!r}]", number, least)


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, found {value!r}.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def check_names(stage: str, found: Sequence[str], tasks: Sequence[str], *, complete: bool) -> None:
    """Refuse data whose names are not those of the module's tasks."""
    if unknown := [task for task in found if task not in tasks]:
        raise ValueError(
            f"{stage} has data of {unknown}, but the module's tasks are {list(tasks)}. Name both alike, or leave these "
            "data out."
        )
    if complete and (missing := [task for task in tasks if task not in found]):
        raise ValueError(
            f"{stage} has no data of the module's tasks {missing}, only of {list(found)}. Add a dataset for each, or "
            "give the module those tasks alone."
        )
