"""The data module that holds a dataset for each task."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset

from lightning_mtl.data.arguments import check_data_arguments, check_following, check_names, value_for_task
from lightning_mtl.data.division import ShardIterables
from lightning_mtl.data.loaders import EvaluationLoader, MixedLoader
from lightning_mtl.data.mixing import Joint, Mixing
from lightning_mtl.data.opening import open_stream
from lightning_mtl.data.order import Shard
from lightning_mtl.data.sources import read_source
from lightning_mtl.data.streams import Stream
from lightning_mtl.distributed import of_each, sum_over
from lightning_mtl.task.batches import as_pair
from lightning_mtl.task.module import TaskModule

DataStage = Literal["train", "val", "test", "predict"]
TaskData = Mapping[str, Dataset[Any] | Iterable[Any]]

# The loaders that each of the Trainer's functions asks for.
LOADED_STAGES: dict[str, tuple[DataStage, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class MultiTaskDataModule(pl.LightningDataModule):
    """Loads a dataset, or a loader, for each task: a LightningDataModule.

    A training batch is ``{task: (inputs, target)}`` with the tasks that the mixing mode takes in that step. Validation,
    test and prediction take a batch of every task a step, until all are at their end, so that figures and predictions
    keep the tasks' names: ``val/loss/<task>``, ``trainer.predict(...)[0]["<task>"]``.

    On R ranks each sees other samples: together, those of one process with R times the batch size, and none twice.
    (``Trainer(use_distributed_sampler=...)`` makes no difference: the samplers are ours.) Evaluation and prediction
    take each sample exactly once. Who makes batches, and who divides which data, is in ``docs/data.md``. The order of
    tasks and samples is a function of the seed alone; a run that is resumed from a checkpoint, in the midst of an
    epoch, too, goes on with the batches that the uninterrupted one would have had, with any number of workers.

    Args:
        train: ``{task: data}`` for all tasks of the module, the data being a map-style or iterable dataset that yields
            ``(inputs, target)``, or a DataLoader, of which dataset and settings are taken, or any loader of batches
            with an order of its own (``StatefulDataLoader``, ``WebLoader``, a list of batches in
            ``DataLoader(batches, batch_size=None)``), which is used as it is.
        val: The same for validation, for some of the tasks or all.
        test: The same for testing.
        predict: The same for prediction, where inputs alone suffice.
        mixing: Which tasks a training step takes: ``Joint()``, ``RoundRobin()``, ``Proportional()``, ``Ratios(...)`` or
            ``Schedule(...)`` of :mod:`lightning_mtl.data`.
        batch_size: Samples a batch of each rank, one number or ``{task: number}``; None where the elements of a dataset
            are batches already. Loaders bring their own.
        steps_per_epoch: Training steps an epoch; by default the mode's number. A task's next epoch goes on where the
            last one stopped.
        drop_last: Leave the incomplete batch at the end of a training pass out; evaluation leaves nothing out.
        num_workers: Processes that load each task's data. Those of training live as long as the training; all end with
            the Trainer's function.
        pin_memory: Copy batches to page-locked memory, from where a GPU fetches them faster.
        persistent_workers: Keep the workers of validation and test from one validation to the next.
        shard_iterables: What is divided here of iterable datasets, and over ranks of a loader's batches: True, each
            rank and worker keeps every n-th of the whole; False, the data tell them apart themselves; ``"ranks"`` or
            ``"workers"``, only these are divided here; or ``{task: answer}``. Hugging Face's and webdataset's datasets
            and ``DistributedSampler`` are known and need none; without an answer others are refused.
        seed: Of the order of samples and tasks; by default that of ``seed_everything``, or 0. A resumed run
            goes on with the seed of its checkpoint.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, data are empty, names differ, or evaluation would repeat samples or
            leave some out; at setup, if the names are not those of the module's tasks, or nobody divides the data.

    Warns:
        UserWarning: If ranks or workers begin with the same batch, or ranks that share one order with different ones.

    Resuming: map-style data go on at the next unseen sample, on another number of ranks or with another batch size,
    too. An iterable dataset with ``state_dict`` and ``load_state_dict`` (of tensors and plain numbers) goes on from its
    state if it has no workers; so does a loader that has them, torchdata's ``StatefulDataLoader`` for one. Other
    iterables are read again, and what had been consumed thrown away. Random augmentation is not part of any of this.

    To make the datasets late, override :meth:`task_data`, and :meth:`prepare_data` for a download.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> many = TensorDataset(torch.zeros(8, 3), torch.zeros(8, 1))
        >>> few = TensorDataset(torch.ones(2, 3), torch.ones(2, 1))
        >>> data = MultiTaskDataModule({"age": many, "smile": few}, batch_size=2)
        >>> [list(batch) for batch in data.train_dataloader()]
        [['age', 'smile'], ['age', 'smile'], ['age', 'smile'], ['age', 'smile']]
    """

    def __init__(
        self,
        train: TaskData | None = None,
        val: TaskData | None = None,
        test: TaskData | None = None,
        predict: TaskData | None = None,
        *,
        mixing: Mixing | None = None,
        batch_size: int | Mapping[str, int | None] | None = 32,
        steps_per_epoch: int | None = None,
        drop_last: bool = False,
        num_workers: int | Mapping[str, int] = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        shard_iterables: ShardIterables | Mapping[str, ShardIterables] = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.mixing = Joint() if mixing is None else mixing
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.shard_iterables = shard_iterables
        self.seed = seed
        self._given: dict[str, TaskData | None] = {"train": train, "val": val, "test": test, "predict": predict}
        check_data_arguments(self._given, self.mixing, batch_size, num_workers, steps_per_epoch, shard_iterables, seed)
        for stage, data in self._given.items():
            for task, own in (data or {}).items():
                read_source(task, stage, own, batch_size, {})
        self._loader: MixedLoader | None = None
        self._opened: WeakSet[Stream] = WeakSet()
        self._restored: dict[str, Any] | None = None

    def task_data(self, stage: DataStage) -> TaskData | None:
        """Return the datasets or loaders of a stage, ``{task: data}``, or None; override it to make them late.

        It is called on every rank, after :meth:`prepare_data`, and may be called again.
        """
        return self._given[stage]

    def setup(self, stage: str) -> None:
        """Refuse data whose names are not those of the module's tasks; start the training data from the beginning."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        if isinstance(module, TaskModule):
            # A module without a trunk reads batches by itself, under whatever names.
            for part in LOADED_STAGES[stage] if module.the_trunk is not None else ():
                if (data := self.task_data(part)) is not None:
                    check_names(part, list(data), list(module.tasks), complete=part == "train")
            if stage == "fit":
                check_following(self.mixing, module, self.task_data)
        # Lightning validates where the hook val_dataloader is overridden. Whether there are validation data is known
        # here only, so that the instance takes the override back, as LightningDataModule.from_datasets does.
        vars(self).pop("val_dataloader", None)
        if stage == "fit":
            self._loader = self._restored = None
            if self.task_data("val") is None:
                self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        # Lightning ends those of loaders that it knows; it does not know the ones within ours. If they were left to the
        # garbage collector (a Trainer is in a cycle of references), it would close their queues first, so that they do
        # not hear that they are to end: torch then waits five seconds for each before it kills it.
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """End the worker processes: after an error Lightning does not call :meth:`teardown`."""
        self._close()

    def _close(self) -> None:
        for stream in self._opened:
            stream.close()
        self._opened.clear()

    # The loaders

    def train_dataloader(self) -> MixedLoader:
        """Make the loader that mixes the tasks."""
        # By hand every loader begins anew; a Trainer may ask again in the midst of training.
        state = self.state_dict() if self._fitting else self._restored or {}
        seed = state.get("seed", self._seed())
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        streams = self._streams("train", seed, shuffle=not overfit)
        self.mixing.check(list(streams))
        steps = self.steps_per_epoch or self.mixing.steps({task: stream.batches for task, stream in streams.items()})
        self._loader = MixedLoader(
            streams, self.mixing, steps, seed, self._shard(), of_each, same_epoch=overfit, one_pass=self._pass_beside
        )
        self._loader.trainer = self.trainer if self._fitting else None
        if state:
            self._loader.load_state_dict(state)
        return self._loader

    @property
    def shares(self) -> dict[str, float] | None:
        """The tasks' shares of the present epoch's steps, where the mixing mode follows validation."""
        return None if self._loader is None else self._loader.shares

    def _pass_beside(self) -> EvaluationLoader:
        """All training samples once, of the tasks whose data do not come but once."""
        streams = self._streams("train", self._seed(), shuffle=False)
        return EvaluationLoader({task: stream for task, stream in streams.items() if stream.alike_on_ranks})

    def val_dataloader(self) -> EvaluationLoader:
        """Make the loader of all tasks' validation data."""
        return self._evaluation("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Make the loader of all tasks' test data."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Make the loader of all tasks' data to predict from."""
        return self._evaluation("predict", as_pair)

    def _evaluation(self, stage: DataStage, read: Callable[[Any], Any] | None = None) -> EvaluationLoader:
        streams = self._streams(stage, self._seed(), shuffle=False)
        anyone = None
        if self.trainer is not None and self._shard().ranks > 1:
            # Where a stream's length is unknown, the ranks ask each other in each step whether any has a batch left.
            unknown = any(not stream.alike_on_ranks for stream in streams.values())
            anyone = functools.partial(_anyone, self.trainer) if unknown else None
        return EvaluationLoader(streams, anyone, read)

    def _streams(self, stage: DataStage, seed: int, *, shuffle: bool) -> dict[str, Stream]:
        data = self.task_data(stage)
        if data is None:
            raise ValueError(
                f"{type(self).__name__} has no data for this stage; give it {stage}={{task: dataset}}, or override "
                "task_data."
            )
        streams, shard = {}, self._shard()
        for task, given in data.items():
            workers = value_for_task(self.num_workers, task, 0)
            options = {
                "num_workers": workers,
                "pin_memory": self.pin_memory,
                "persistent_workers": self.persistent_workers and workers > 0,
            }
            source = read_source(task, stage, given, self.batch_size, options, self.drop_last, shard.ranks)
            answer = value_for_task(self.shard_iterables, task, None)
            streams[task] = open_stream(source, shard, seed, shuffle=shuffle, shard_iterables=answer)
        self._opened.update(streams.values())
        if shard.ranks > 1:
            _agree_on_lengths(streams)
        return streams

    @property
    def _fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    # The ranks

    def _shard(self) -> Shard:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return Shard(kwargs["rank"], kwargs["num_replicas"]) if kwargs is not None else Shard()

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what training has consumed; all ranks must call this together, as Lightning does."""
        return self._loader.state_dict() if self._loader is not None else self._restored or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue after what was consumed."""
        self._loader, self._restored = None, state_dict


def _agree_on_lengths(streams: Mapping[str, Stream]) -> None:
    """Let every rank count a pass as long as the rank with the most batches does; all ranks call this together.

    Raises:
        ValueError: If a map-style dataset is not the same on all ranks, which divide its samples.
    """
    of_ranks = of_each({task: (stream.batches, stream.samples) for task, stream in streams.items()})
    for task, stream in streams.items():
        lengths, sizes = zip(*(found[task] for found in of_ranks), strict=True)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"The data of {task!r} have {list(sizes)} samples on the ranks, which each take a share of them: give "
                "every rank the whole dataset, not its part."
            )
        stream.batches = None if None in lengths else max(lengths)


def _anyone(trainer: pl.Trainer, more: bool) -> bool:
    """Whether any rank has a batch left."""
    return bool(sum_over(trainer, torch.tensor(float(more), device=trainer.strategy.root_device)))
