"""The samples of ranks, passes and epochs, counted one by one."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mtl.data import Joint, Mixing, MultiTaskDataModule, Proportional, Ratios, RoundRobin
from lightning_mtl.data.opening import open_stream
from lightning_mtl.data.order import Batches, DataPosition, PassOrder, Shard
from lightning_mtl.data.sources import read_source
from tests.loaders.samples import Numbered, counted, seen_in


def orders(size: int, batch_size: int, ranks: int, **arguments: Any) -> list[PassOrder]:
    settings: dict[str, Any] = {"shuffle": True} | arguments
    return [PassOrder(size, batch_size, Shard(rank, ranks), 7, "a", **settings) for rank in range(ranks)]


def places(order: PassOrder, passes: int) -> list[DataPosition]:
    found = [DataPosition()]
    while found[-1].passes < passes:
        found.append(order.after(found[-1]))
    return found[:-1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (7, 2), (12, 3), (13, 3)])
def test_ranks_share_each_pass_without_a_sample_twice(size: int, batch_size: int, ranks: int) -> None:
    shards = orders(size, batch_size, ranks)
    whole = PassOrder(size, batch_size * ranks, Shard(), 7, "a", shuffle=True)
    assert all(order.batches == whole.batches for order in shards)
    passes = []
    for number in range(3):
        seen = []
        for place in places(whole, 3):
            if place.passes == number:
                parts = [order.indices(place) for order in shards]
                assert [order.share(place) for order in shards] == [len(part) for part in parts]
                # The batch of one process, dealt out; the shares differ by one sample at most.
                assert sorted(itertools.chain(*parts)) == sorted(whole.indices(place))
                assert max(map(len, parts)) - min(map(len, parts)) <= 1
                seen += list(itertools.chain(*parts))
        assert sorted(seen) == list(range(size))
        passes.append(tuple(seen))
    assert len(set(passes)) == 3 or size == 1


def test_the_incomplete_batch_can_be_dropped() -> None:
    seen = Counter(index for order in orders(13, 3, 2, drop_last=True) for batch in first(order, 4) for index in batch)
    assert sum(seen.values()) == 4 * 6
    assert orders(13, 3, 2, drop_last=True)[0].batches == 2


def first(order: PassOrder, batches: int) -> list[list[int]]:
    return list(itertools.islice(Batches(order, DataPosition()), batches))


def test_another_seed_or_name_is_another_order() -> None:
    base = PassOrder(50, 50, Shard(), 7, "a", shuffle=True)
    others = [PassOrder(50, 50, Shard(), 8, "a", shuffle=True), PassOrder(50, 50, Shard(), 7, "b", shuffle=True)]
    found = [tuple(order.indices(DataPosition())) for order in (base, *others)]
    assert len(set(found)) == 3


@pytest.mark.parametrize("batch_size", [2, 5])
def test_from_any_place_on_the_samples_are_the_same(batch_size: int) -> None:
    """What has been consumed is counted in samples: a run may go on with another batch size or number of ranks."""
    (order,) = orders(11, 3, 1)
    whole = [index for batch in first(order, 8) for index in batch]
    for start, place in enumerate(places(order, 2)):
        (other,) = orders(11, batch_size, 1)
        rest = [index for batch in itertools.islice(Batches(other, place), 6) for index in batch]
        consumed = sum(map(len, first(order, start)))
        assert rest[: len(whole) - consumed] == whole[consumed:][: len(rest)]


TASKS = {"a": 21, "b": 8, "c": 3}


@pytest.mark.parametrize(
    ("mixing", "steps", "epoch_counts"),
    [
        # batches of 4: 6, 2 and 1 of a pass
        (Joint(), 6, {"a": 1, "b": 3, "c": 6}),
        (Joint("shortest"), 1, {}),
        (RoundRobin(), 18, {"a": 1, "b": 3, "c": 6}),
        (Proportional(), 9, {"a": 1, "b": 1, "c": 1}),
        (Ratios({"a": 0, "b": 2, "c": 1}), 9, {"a": 0, "b": 3, "c": 3}),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mixing) else "",
)
def test_every_sample_is_seen_as_often_as_the_mode_says(
    mixing: Mixing, steps: int, epoch_counts: dict[str, int]
) -> None:
    data = MultiTaskDataModule({task: Numbered(size) for task, size in TASKS.items()}, mixing=mixing, batch_size=4)
    loader = data.train_dataloader()
    assert len(loader) == steps
    epochs = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        epochs.append([seen_in(batch) for batch in loader])
        assert len(epochs[-1]) == steps
    for epoch_seen in epochs if epoch_counts else []:
        for task, times in epoch_counts.items():
            found = counted(epoch_seen).get(task, Counter())
            assert found == Counter(dict.fromkeys(range(TASKS[task]), times))
    # Over epochs, too: no sample of a task is a pass ahead of another.
    for task, size in TASKS.items():
        found = counted([step for epoch_seen in epochs for step in epoch_seen]).get(task, Counter())
        often = [found[number] for number in range(size)]
        assert max(often) - min(often) <= 1


def test_tasks_come_in_another_order_in_every_epoch() -> None:
    data = MultiTaskDataModule({"a": Numbered(32), "b": Numbered(32)}, mixing=Proportional(), batch_size=2)
    mixed, epochs = data.train_dataloader(), []
    for epoch in range(3):
        mixed.set_epoch(epoch)
        epochs.append("".join(task for batch in mixed for task in batch))
    assert len(set(epochs)) == 3
    assert [epoch.count("a") for epoch in epochs] == [16] * 3


class Drawing(Numbered):
    """What a random augmentation in a worker would begin with."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(torch.initial_seed()), torch.zeros(1)


def test_workers_of_every_rank_and_task_draw_random_numbers_of_their_own() -> None:
    drawn = []
    for rank, task in itertools.product(range(2), "ab"):
        source = read_source(task, "train", Drawing(8), 2, {"num_workers": 1})
        drawn.append(int(open_stream(source, Shard(rank, 2), 7, shuffle=True, shard_iterables=None).next()[0][0]))
    assert len(set(drawn)) == 4


def test_plain_loaders_are_taken_apart() -> None:
    """Their shuffling, batch size and drop_last hold; the order is ours."""
    shuffled = DataLoader(Numbered(10), batch_size=4, shuffle=True, drop_last=True)
    ordered = DataLoader(Numbered(6), batch_size=2)
    data = MultiTaskDataModule({"a": shuffled, "b": ordered}, mixing=Joint("shortest"), seed=3)
    loader = data.train_dataloader()
    first_epoch, again = (list(map(seen_in, loader)) for _ in range(2))
    assert [len(step["a"] or ()) for step in first_epoch] == [4, 4]
    assert [step["b"] for step in first_epoch] == [[0, 1], [2, 3]]
    assert [step["b"] for step in again] == [[4, 5], [0, 1]]
    assert sorted(itertools.chain(*(step["a"] or () for step in first_epoch))) != list(range(8))
