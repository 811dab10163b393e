"""Datasets whose samples know their number, and what became of them in a training."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.data import MultiTaskDataModule
from tests.small import small
from tests.training import quiet_trainer

Sample = tuple[Tensor, Tensor]
Seen = dict[str, list[int] | None]  # of a step; None is a task without a sample on this rank


def sample(number: int) -> Sample:
    return torch.tensor([number / 1000, 0.5, -0.5]), torch.tensor([float(number % 2)])


class Numbered(Dataset[Sample]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return sample(index)


class Flowing(IterableDataset[Sample]):
    """The same numbers without a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Sample]:
        return map(sample, range(self.size))


class Sized(Flowing):
    def __len__(self) -> int:
        return self.size


class Remembering(Flowing):
    """Goes on from its state: what it has given is not read again."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.given = self.start = self.read = 0

    def __iter__(self) -> Iterator[Sample]:
        self.given, self.start = self.start, 0
        while self.given < self.size:
            self.given += 1
            self.read += 1
            yield sample(self.given - 1)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.start = state["given"]


def numbers(inputs: Tensor) -> list[int]:
    return [round(1000 * value) for value in inputs[:, 0].tolist()]


def seen_in(batch: Mapping[str, Any]) -> Seen:
    return {task: None if pair is None else numbers(pair[0]) for task, pair in batch.items()}


def counted(steps: Sequence[Seen]) -> dict[str, Counter[int]]:
    """How often each sample of each task was seen."""
    found: dict[str, Counter[int]] = {}
    for step in steps:
        for task, seen in step.items():
            found.setdefault(task, Counter()).update(seen or [])
    return found


class Watch(pl.Callback):
    """Keeps the samples of every training step, by epoch, and saves after some of them."""

    def __init__(self, save_after: int = -1, path: Path | None = None) -> None:
        self.epochs: list[list[Seen]] = []
        self.save_after, self.path = save_after, path

    @property
    def steps(self) -> list[Seen]:
        return [step for epoch in self.epochs for step in epoch]

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if not self.epochs:  # resumed in the midst of an epoch
            self.epochs.append([])
        self.epochs[-1].append(seen_in(batch))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.fit_loop.total_batch_idx + 1 == self.save_after:
            trainer.save_checkpoint(self.path)


class SaveAtEpochEnd(pl.Callback):
    def __init__(self, epoch: int, path: Path, *, after_validation: bool) -> None:
        self.epoch, self.path, self.after_validation = epoch, path, after_validation

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, after_validation=False)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, after_validation=True)

    def _save(self, trainer: pl.Trainer, *, after_validation: bool) -> None:
        if self.after_validation == after_validation and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def module(tasks: Sequence[str], **arguments: Any) -> MultiTaskModule:
    return small(tasks, optimizer=functools.partial(torch.optim.SGD, lr=0.01), **arguments)


def train(data: MultiTaskDataModule, *, tasks: Sequence[str], ckpt: Path | None = None, **arguments: Any) -> Watch:
    """Fit, and return what was seen; a callback of the caller's that is a Watch serves."""
    callbacks: list[pl.Callback] = list(arguments.pop("callbacks", []))
    watch = next((callback for callback in callbacks if isinstance(callback, Watch)), None)
    if watch is None:
        watch = Watch()
        callbacks.append(watch)
    trainer = quiet_trainer(callbacks=callbacks, **arguments)
    trainer.fit(module(tasks), datamodule=data, ckpt_path=ckpt)
    return watch


Make = Callable[[], MultiTaskDataModule]
