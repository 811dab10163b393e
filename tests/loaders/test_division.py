"""Who divides samples over ranks and workers, and who makes batches: each sample once, or a word about it."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl.data import Joint, MultiTaskDataModule
from lightning_mtl.data.order import DataPosition, PassOrder, Shard
from lightning_mtl.data.samplers import known_order
from tests.distributed.pairs import Pair
from tests.loaders import dividing
from tests.loaders.dividing import DIVIDED, SIZE, WRONG, ByInit, ByWorker, Shuffling, Wrong, batches, weighted
from tests.loaders.samples import Flowing, Numbered, Sized, numbers, sample, seen_in

# torchdata's loader calls what torch has deprecated: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def evaluated(data: Any, **arguments: Any) -> list[list[int]]:
    loader = MultiTaskDataModule(val={"a": data}, **({"batch_size": 4} | arguments)).val_dataloader()
    return [numbers(batch["a"][0]) for batch in loader]


def once(found: list[list[int]], size: int = SIZE) -> bool:
    return Counter(itertools.chain(*found)) == Counter(range(size))


def by_init(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(ByInit(SIZE), batch_size=4, num_workers=2, worker_init_fn=dividing.set_part, **arguments)


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: Flowing(SIZE), True),
        (lambda: Sized(SIZE), True),
        (lambda: ByWorker(SIZE), True),
        (lambda: ByWorker(SIZE), False),
        (lambda: ByWorker(SIZE), "ranks"),
        (lambda: Shuffling(SIZE), True),
        (by_init, True),
        (by_init, False),
    ],
)
def test_two_workers_read_each_sample_once(make: Callable[[], Any], answer: Any) -> None:
    assert once(evaluated(make(), num_workers=2, shard_iterables=answer))


def test_workers_that_read_the_same_are_named() -> None:
    for data in (Flowing(SIZE), StatefulDataLoader(Flowing(SIZE), batch_size=4, num_workers=2)):
        with pytest.warns(UserWarning, match=re.escape("val['a']: all 2 workers begin with the same batch")):
            assert len(evaluated(data, num_workers=2, shard_iterables=False)) == 6
    with pytest.raises(ValueError, match=re.escape("a loader whose 2 workers would each read all of an iterable")):
        evaluated(StatefulDataLoader(Flowing(SIZE), batch_size=4, num_workers=2), shard_iterables=True)


@pytest.mark.parametrize(("size", "workers"), [(18, 2), (17, 2), (1, 2)])
def test_lengths_are_those_of_the_passes(size: int, workers: int) -> None:
    """The incomplete batches of all workers are among them, and evaluation drops none."""
    arguments: dict[str, Any] = {"batch_size": 8, "num_workers": workers, "shard_iterables": True, "drop_last": True}
    loader = MultiTaskDataModule(val={"a": Sized(size)}, **arguments).val_dataloader()
    found = [numbers(batch["a"][0]) for batch in loader]
    assert len(loader) == len(found)
    assert once(found, size)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_of_a_sized_iterable_is_a_pass(drop_last: bool) -> None:
    data = MultiTaskDataModule({"a": Sized(23)}, batch_size=4, num_workers=2, drop_last=drop_last, shard_iterables=True)
    found = [numbers(batch["a"][0]) for batch in data.train_dataloader()]
    assert once(found, 23) if not drop_last else [len(batch) for batch in found] == [4] * 5
    with pytest.raises(ValueError, match=re.escape("train['a'] has 6 samples, too few for a batch of 4 on each")):
        MultiTaskDataModule(
            {"a": Sized(6)}, batch_size=4, num_workers=2, drop_last=True, shard_iterables=True
        ).train_dataloader()


def test_a_length_that_is_too_short_is_refused_in_evaluation() -> None:
    with pytest.raises(ValueError, match=re.escape("val['a'] gives more than its length says, 3 batches of this rank")):
        evaluated(Wrong(13))
    # Who divides over workers is not asked how many batches they make of it.
    data = MultiTaskDataModule(val={"a": ByWorker(3)}, num_workers=2, shard_iterables=False)
    with pytest.raises(TypeError, match="no length"):
        len(data.val_dataloader())


def test_ready_made_batches_are_not_batched_again() -> None:
    for data, sizes in (
        (batches(11), None),
        (DataLoader(batches(11), batch_size=None), 4),  # type: ignore[arg-type]
        (DataLoader(batches(11), batch_size=None, sampler=SequentialSampler(range(4))), 4),  # type: ignore[arg-type]
    ):
        assert evaluated(data, batch_size=sizes) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    shuffled: DataLoader[Any] = DataLoader(batches(9), batch_size=None, shuffle=True)  # type: ignore[arg-type]
    mixed = MultiTaskDataModule({"a": shuffled, "b": Numbered(12)}, batch_size={"b": 4}, mixing=Joint())
    assert once([numbers(batch["a"][0]) for batch in mixed.train_dataloader()], 9)


class Fluid(Flowing):
    """What webdataset's pipelines look like: stages, the first one perhaps a DataLoader."""

    def __init__(self, first: Any, *names: str) -> None:
        super().__init__(SIZE)
        stages = [type("Stage", (), {"f": staticmethod(type(name, (), {"__name__": name}))})() for name in names]
        self.pipeline = [first, *stages]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pipeline[0])


def test_a_loader_that_is_an_iterable_dataset_by_class_is_a_loader() -> None:
    assert once(evaluated(Fluid(DataLoader(Numbered(SIZE), batch_size=5))))
    with pytest.raises(ValueError, match=re.escape("val['a'] makes batches itself (Fluid.batched), of which there")):
        evaluated(Fluid(batches(SIZE), "_batched"))
    assert once(evaluated(Fluid(batches(SIZE), "_batched"), batch_size={"a": None}))
    with pytest.raises(ValueError, match=re.escape("val['a'] is a Fluid with drop_last=True, which leaves samples")):
        evaluated(Fluid(DataLoader(Numbered(SIZE), batch_size=5, drop_last=True)))
    assert len(evaluated(Fluid(map(sample, range(SIZE)), "_batched", "_unbatched"))) == 3


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (RandomSampler(range(6), num_samples=9), [1.5] * 6),
        (RandomSampler(range(6), replacement=True, num_samples=9), [1.5] * 6),
        (weighted(6).sampler, [1.0] * 6),
        (SubsetRandomSampler([4, 1]), [0, 1, 0, 0, 1, 0]),
    ],
)
def test_torchs_samplers_are_drawn_alike_on_all_ranks(sampler: Any, expected: list[float]) -> None:
    order = known_order(sampler, 2)
    assert order is not None
    size = len(order.indices) if order.indices else 6
    draws, counts = order.draws or size, torch.zeros(6)
    shards = [PassOrder(draws, 2, Shard(rank, 2), 0, "a", True, draw=order.draw, population=size) for rank in range(2)]
    passes = 400
    for number, start in itertools.product(range(passes), range(0, draws, 4)):
        drawn = [index for shard in shards for index in shard.indices(DataPosition(number, start))]
        assert len(drawn) == min(4, draws - start)
        for index in drawn:
            counts[order.indices[index] if order.indices else index] += 1
    tolerance = 5 * math.sqrt(1.5 / passes)
    assert (counts / passes).tolist() == pytest.approx(expected, abs=tolerance)


def test_loaders_that_would_not_evaluate_each_sample_once_are_refused() -> None:
    for loader, words in (
        (weighted(4), "draws samples at random, some of them twice or never"),
        (DataLoader(Numbered(4), sampler=RandomSampler(Numbered(4), num_samples=3)), "draws samples at random"),
        (StatefulDataLoader(Numbered(5), batch_size=2, drop_last=True), "with drop_last=True, which leaves samples"),
        (StatefulDataLoader(Numbered(4), sampler=weighted(4).sampler), "draws samples at random"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            MultiTaskDataModule(val={"a": loader})
    # The order and what is dropped are training's.
    dropping = DataLoader(Numbered(SIZE), batch_sampler=BatchSampler(RandomSampler(Numbered(SIZE)), 4, drop_last=True))
    assert evaluated(dropping)[-1] == [8, 9, 10]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("both", "shard_iterables='both' must be one of None, True, False, 'ranks', 'workers'"),
        (1, "shard_iterables=1 must be one of"),
        ({"a": "x"}, "shard_iterables['a']='x' must be one of"),
        ({"b": True}, "shard_iterables names ['b'], but the tasks of the data are ['a']"),
    ],
)
def test_answers_that_are_none(answer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        MultiTaskDataModule({"a": Flowing(3)}, shard_iterables=answer)


def test_two_ranks(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.run(dividing.evaluate)
    for name in DIVIDED:
        assert once([first[name], second[name]]), name
    told, _ = pair.run(dividing.be_wrong)
    for name, (_, _, words) in WRONG.items():
        assert any(words in each for each in told[name]), (name, told[name])
    ranks = pair.run(dividing.train, tmp_path)
    for whole, resumed in ranks:
        assert [step for epoch in resumed for step in epoch] == [step for epoch in whole for step in epoch][4:]
    # One process with twice the batch size draws the same.
    loader = MultiTaskDataModule({"weighted": weighted(12, 4)}, seed=3).train_dataloader()
    drawn = [sorted(step["weighted"] or ()) for step in map(seen_in, loader)]
    assert [
        sorted(itertools.chain(*parts))
        for parts in zip(*([step["weighted"] for step in whole[0]] for whole, _ in ranks), strict=True)
    ] == drawn
    for epoch, name in itertools.product(range(2), ("stateful", "by both")):
        assert once([step[name] for whole, _ in ranks for step in whole[epoch]], 12), (epoch, name)
