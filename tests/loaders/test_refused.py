"""Wrong data and wrong numbers: the error names them and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_mtl.data import MultiTaskDataModule, RoundRobin
from lightning_mtl.data.division import divide
from lightning_mtl.data.iterables import EveryNth
from lightning_mtl.data.order import Shard
from lightning_mtl.data.sources import DatasetSource, LoaderSource, read_source
from tests.loaders.samples import Flowing, Numbered, Sample, Sized, module, numbers
from tests.training import quiet_trainer


def refused(kind: type[Exception], words: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        MultiTaskDataModule(*args, **kwargs)


class NoLength(Dataset[Sample]):
    def __getitem__(self, index: int) -> Sample:
        raise IndexError


def test_data() -> None:
    refused(ValueError, "train['b'] is empty: Numbered has no sample", {"a": Numbered(3), "b": Numbered(0)})
    refused(ValueError, "val['a'] is empty: Numbered has no sample", val={"a": DataLoader(Numbered(0))})
    refused(ValueError, "test['a'] is empty: list has no sample", test={"a": []})
    refused(TypeError, "train['a'] is a NoLength without __len__", {"a": NoLength()})
    refused(TypeError, "train['a'] must be a dataset, or a loader that can be read again", {"a": 3})
    refused(TypeError, "found generator", {"a": (x for x in [1])})
    refused(TypeError, "train must be {task: dataset or loader} with an entry or more, found {}", {})
    refused(TypeError, "train must be {task: dataset or loader}", Numbered(3))
    refused(TypeError, "train names the task 3, which is no string", {3: Numbered(3)})
    words = "val has data of ['A'], which train does not know: its tasks are ['a']. Name them alike"
    refused(ValueError, words, {"a": Numbered(3)}, {"A": Numbered(3)})


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (ValueError, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (ValueError, {"batch_size": {"a": -1}}, "batch_size['a']=-1 must be at least 1"),
        (
            ValueError,
            {"batch_size": {"a": 1, "z": 2}},
            "batch_size names ['z'], but the tasks of the data are ['a', 'b']",
        ),
        (ValueError, {"batch_size": {"a": 1}}, "batch_size has no entry for the task 'b'"),
        (TypeError, {"batch_size": 2.5}, "batch_size must be an int, found 2.5"),
        (TypeError, {"batch_size": True}, "batch_size must be an int, found True"),
        (ValueError, {"num_workers": -1}, "num_workers=-1 must be at least 0"),
        (ValueError, {"steps_per_epoch": 0}, "steps_per_epoch=0 must be at least 1"),
        (ValueError, {"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_numbers(kind: type[Exception], arguments: dict[str, Any], words: str) -> None:
    refused(kind, words, {"a": Numbered(3), "b": Numbered(3)}, **arguments)


def test_a_batch_that_nothing_fills() -> None:
    data = MultiTaskDataModule({"a": Numbered(3)}, batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match=re.escape("train['a'] has 3 samples, fewer than the 4 of one batch")):
        data.train_dataloader()
    # What is evaluated is never left out.
    assert len(MultiTaskDataModule(val={"a": Numbered(3)}, batch_size=4, drop_last=True).val_dataloader()) == 1


class Once:
    """An iterable of batches that can be read only once, as a file that is not opened anew."""

    def __init__(self, batches: int) -> None:
        inputs = torch.zeros(2, 3), torch.zeros(2, 1)
        self.batches = iter([inputs] * batches)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@pytest.mark.parametrize("batches", [0, 2])
def test_a_loader_that_ends_at_once(batches: int) -> None:
    data = MultiTaskDataModule({"a": Numbered(3), "b": Once(batches)}, mixing=RoundRobin(), steps_per_epoch=9)
    words = f"train['b'] ended at once: pass {1 + (batches > 0)} over it gave no batch"
    with pytest.raises(ValueError, match=re.escape(words)):
        quiet_trainer().fit(module(["a", "b"]), datamodule=data)


def test_sized_iterables_without_a_sample() -> None:
    with pytest.raises(ValueError, match=re.escape("train['a'] is empty: Sized has no sample")):
        MultiTaskDataModule({"a": Sized(0)}).train_dataloader()


def test_iterables_that_workers_would_all_read() -> None:
    for workers in (1, 2):
        data = MultiTaskDataModule({"a": Flowing(3)}, num_workers=workers, steps_per_epoch=2)
        if workers == 1:
            data.train_dataloader()
        else:
            with pytest.raises(ValueError, match="Set shard_iterables=True to give each of them every n-th sample"):
                data.train_dataloader()
    source = read_source("a", "train", Flowing(3), 2, {})
    assert not isinstance(source, DatasetSource)
    with pytest.raises(ValueError, match="read by 2 ranks with 0 workers each"):
        divide(source, Shard(0, 2), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_divide_iterables(workers: int) -> None:
    data = MultiTaskDataModule(val={"a": Flowing(11)}, batch_size=2, num_workers=workers, shard_iterables=True)
    seen = [number for batch in data.val_dataloader() for number in numbers(batch["a"][0])]
    assert sorted(seen) == list(range(11))


def test_every_nth_sample_of_a_rank() -> None:
    shares = [[numbers(x[None])[0] for x, _ in EveryNth(Flowing(8), Shard(rank, 3))] for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


class Own(Sampler[int]):
    """A sampler that nobody knows."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter([2, 0, 1])


def test_orders_of_ones_own_on_several_ranks() -> None:
    loader = DataLoader(Numbered(3), sampler=Own())
    source = read_source("a", "train", loader, None, {})
    assert isinstance(source, LoaderSource)
    assert source.loader is loader
    divide(source, Shard(), None)
    with pytest.raises(ValueError, match="a loader with an order of its own, which 2 ranks would all read alike"):
        divide(source, Shard(0, 2), None)
