"""Iterables that divide themselves over workers, over ranks, over both or not at all, and samplers of one's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, Sampler, WeightedRandomSampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl.data import MultiTaskDataModule
from tests.loaders.samples import Flowing, Numbered, Sample, Sized, Watch, module, sample, seen_in
from tests.training import quiet_trainer


def rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)


class ByWorker(Flowing):
    def __iter__(self) -> Iterator[Sample]:
        (own, workers) = worker()
        return map(sample, range(own, self.size, workers))


class ByRank(Flowing):
    def __iter__(self) -> Iterator[Sample]:
        (own, ranks) = rank()
        return map(sample, range(own, self.size, ranks))


class ByBoth(Flowing):
    def __iter__(self) -> Iterator[Sample]:
        (own, ranks), (number, workers) = rank(), worker()
        return map(sample, range(own * workers + number, self.size, ranks * workers))


class Shuffling(Flowing):
    """Draws its order from the random numbers that torch gives a worker."""

    def __iter__(self) -> Iterator[Sample]:
        return map(sample, torch.randperm(self.size).tolist())


class ByInit(Flowing):
    """Its part is set from outside, as torch's documentation has it."""

    part = (0, 1)

    def __iter__(self) -> Iterator[Sample]:
        return map(sample, range(self.part[0], self.size, self.part[1]))


def set_part(_: int) -> None:
    info: Any = get_worker_info()
    info.dataset.part = (info.id, info.num_workers)


class Wrong(Sized):
    """Gives two samples more than it says."""

    def __len__(self) -> int:
        return self.size - 2


class RankBatches(Sampler[list[int]]):
    """A batch sampler that knows ranks, as bucketing ones do, and may repeat a sample for all to have as many."""

    def __init__(self, size: int, batch_size: int, *, pads: bool = False) -> None:
        self.size, self.batch_size, self.pads = size, batch_size, pads

    def _own(self) -> list[int]:
        own, ranks = rank()
        found = list(range(own, self.size, ranks))
        return found if not self.pads or len(found) * ranks >= self.size else [*found, 0]

    def __len__(self) -> int:
        return math.ceil(len(self._own()) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        own = self._own()
        return (own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size))


def batches(size: int) -> list[list[torch.Tensor]]:
    """Ready-made batches of three."""
    numbers = [sample(number) for number in range(size)]
    return [[torch.stack(part) for part in zip(*numbers[at : at + 3], strict=True)] for at in range(0, size, 3)]


def weighted(size: int, batch_size: int = 2) -> DataLoader[Sample]:
    return DataLoader(Numbered(size), batch_size, sampler=WeightedRandomSampler([1.0] * size, size))


SIZE = 11
# What two ranks evaluate together: {name: (data, shard_iterables)}. Each sample is to be seen once.
DIVIDED: dict[str, tuple[Any, Any]] = {
    "map": (lambda: Numbered(SIZE), None),
    "batches": (lambda: DataLoader(batches(SIZE), batch_size=None), None),  # type: ignore[arg-type]
    "padding sampler": (
        lambda: DataLoader(Numbered(SIZE), batch_size=2, sampler=DistributedSampler(Numbered(SIZE))),
        None,
    ),
    "nothing": (lambda: Flowing(SIZE), True),
    "sized": (lambda: Sized(SIZE), True),
    "by worker": (lambda: ByWorker(SIZE), "ranks"),
    "by worker, hidden": (lambda: DataLoader(ByWorker(SIZE), batch_size=2, num_workers=2), True),
    "by rank": (lambda: ByRank(SIZE), "workers"),
    "by both": (lambda: DataLoader(ByBoth(SIZE), batch_size=2, num_workers=2), False),
    "stateful, by both": (lambda: StatefulDataLoader(ByBoth(SIZE), batch_size=2), False),
    "stateful": (lambda: StatefulDataLoader(Flowing(SIZE), batch_size=2), True),
    "batch sampler": (lambda: DataLoader(Numbered(SIZE), batch_sampler=RankBatches(SIZE, 2)), False),
}
# What they warn of, or refuse: {name: (data, shard_iterables, words)}.
WRONG: dict[str, tuple[Any, Any, str]] = {
    "divided twice": (lambda: ByRank(SIZE), True, "the ranks begin with different samples"),
    "not divided": (lambda: Flowing(SIZE), False, "all 2 ranks begin with the same batch"),
    "no answer": (lambda: Flowing(SIZE), None, "is an iterable dataset, read by 2 ranks"),
    "stateful": (lambda: StatefulDataLoader(Numbered(SIZE), batch_size=2), None, "a loader with an order of its own"),
    "padding": (
        lambda: DataLoader(Numbered(SIZE), batch_sampler=RankBatches(SIZE, 2, pads=True)),
        False,
        "reads 1 of 11 samples more than once, sample 0 for one, on 2 ranks",
    ),
    "padding loader": (
        lambda: StatefulDataLoader(Numbered(SIZE), batch_size=2, sampler=DistributedSampler(Numbered(SIZE))),
        None,
        "divides 11 samples over 2 ranks by a DistributedSampler, which repeats samples",
    ),
    "a part": (lambda: Numbered(SIZE + rank()[0]), None, "have [11, 12] samples on the ranks"),
}
# What they train on: each sample is to be seen as often as one process does.
TRAINED: dict[str, tuple[Any, Any]] = {
    "weighted": (lambda: weighted(12), None),
    "stateful": (lambda: StatefulDataLoader(Numbered(12), batch_size=2), True),
    "by both": (lambda: StatefulDataLoader(ByBoth(12), batch_size=2), False),
}


class Seen(Watch):
    """Keeps what validation saw of each task, too."""

    def __init__(self, save_after: int = -1, path: Path | None = None) -> None:
        super().__init__(save_after, path)
        self.validated: dict[str, list[int]] = {}

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        for task, seen in seen_in(batch).items():
            self.validated.setdefault(task, []).extend(seen or ())


def _trainer(ranks: int, **arguments: Any) -> pl.Trainer:
    return quiet_trainer(devices=ranks, strategy=DDPStrategy(process_group_backend="gloo"), **arguments)


def see(data: MultiTaskDataModule, tasks: Sequence[str], ranks: int) -> dict[str, list[int]]:
    """What this rank sees of the validation data."""
    _trainer(ranks, callbacks=[seen := Seen()]).validate(module(tasks), datamodule=data, verbose=False)
    return seen.validated


def evaluate(rank: int, ranks: int) -> dict[str, list[int]]:
    """What this rank saw of each of DIVIDED."""
    answers = {name: answer for name, (_, answer) in DIVIDED.items()}
    data = MultiTaskDataModule(
        val={name: make() for name, (make, _) in DIVIDED.items()}, batch_size=2, shard_iterables=answers
    )
    return see(data, list(DIVIDED), ranks)


def be_wrong(rank: int, ranks: int) -> dict[str, list[str]]:
    """What each of WRONG was told."""
    told: dict[str, list[str]] = {}
    for name, (make, answer, _) in WRONG.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                data = MultiTaskDataModule(val={"a": make()}, batch_size=2, shard_iterables=answer)
                _trainer(ranks).validate(module(["a"]), datamodule=data, verbose=False)
                told[name] = []
            except ValueError as error:
                told[name] = [str(error)]
        told[name] += [str(warning.message) for warning in caught]
    return told


def train(folder: Path, rank: int, ranks: int) -> tuple[Sequence[Sequence[Mapping[str, Any]]], ...]:
    """What this rank trained on in two epochs, and what after it was resumed from the fourth step."""
    path, found = folder / "divided.ckpt", []
    for ckpt in (None, path):
        data = MultiTaskDataModule(
            {name: make() for name, (make, _) in TRAINED.items()},
            batch_size=2,
            seed=3,
            steps_per_epoch=3,
            shard_iterables={name: answer for name, (_, answer) in TRAINED.items()},
        )
        watch = Seen() if ckpt else Seen(4, path)
        trainer = _trainer(ranks, max_epochs=2, callbacks=[watch])
        trainer.fit(module(tuple(TRAINED)), datamodule=data, ckpt_path=ckpt)
        found.append(watch.epochs)
    return tuple(found)
