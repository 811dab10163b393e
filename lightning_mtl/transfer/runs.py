"""Trains a module, or some of its tasks alone, and scores it, in the same way for all models to compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.task import Task
from lightning_mtl.task.task import computes_dict
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.step import Optimization
from lightning_mtl.training.update import NotFiniteError
from lightning_mtl.transfer.finished import Directions, TaskScores, diverged_scores

EvaluationStage = Literal["val", "test"]


def task_scores(trainer: pl.Trainer, stage: EvaluationStage = "val") -> TaskScores:
    """Read what each task scored in a Trainer's last validation or test: its mean loss and its metrics, unrounded.

    Args:
        trainer: After ``fit`` with validation data, ``validate`` or ``test``.
        stage: ``"val"`` or ``"test"``.

    Returns:
        ``{task: {metric: value}}`` with ``"loss"`` among the metrics; the same on every rank.

    Raises:
        TypeError: If the Trainer's module is no ``BalancedModule``.
        ValueError: If it has not been through that stage.

    Example:
        >>> scores = task_scores(trainer)  # doctest: +SKIP
        >>> scores["age"]  # doctest: +SKIP
        {'loss': 0.26, 'MeanAbsoluteError': 5.1}
    """
    module = trainer.lightning_module
    if not isinstance(module, BalancedModule):
        raise TypeError(f"task_scores reads what a BalancedModule recorded; the Trainer holds {type(module).__name__}.")
    if not (found := module.recorder.scores[stage]):
        run, data = (
            ("trainer.test", "a test loader") if stage == "test" else ("trainer.validate", "a validation loader")
        )
        raise ValueError(
            f"The Trainer has no {stage} scores: call {run}(module, {data}) first. Strategies that train in processes "
            "of their own, ddp_spawn and ddp_notebook, keep the scores there; use strategy='ddp'."
        )
    return {task: dict(values) for task, values in found.items()}


def metric_directions(tasks: Mapping[str, Task], metrics: Sequence[str] | None = None) -> Directions:
    """Choose which of each task's scores are compared, and find whether higher is better.

    Args:
        tasks: The tasks.
        metrics: Names to compare, each task by those that it has; ``"loss"`` may be among them, and keys of what a
            metric computes. None takes every metric of one number that knows whether higher is better, and the loss of
            a task without one.

    Raises:
        ValueError: If a task has none of the named metrics, or one that does not know whether higher is better.

    Example:
        >>> from torch.nn.functional import l1_loss
        >>> metric_directions({"age": Task(l1_loss)})
        {'age': {'loss': False}}
    """
    directions: Directions = {}
    for name, task in tasks.items():
        own = {
            str(metric): held.higher_is_better
            for metric, held in task.metric_collection().items()
            if not computes_dict(held)  # logged under the dict's keys
        }
        if metrics is None:
            chosen = [metric for metric, direction in own.items() if direction is not None] or ["loss"]
        else:
            chosen = [metric for metric in metrics if task.has_metric(metric)]
        if not chosen:
            raise ValueError(
                f"metrics={list(metrics or [])} has none of task {name!r}, which can be compared by "
                f"{sorted(['loss', *own])}."
            )
        directions[name] = {metric: task.higher_is_better(metric) for metric in chosen}
    return directions


ModuleOrFactory = BalancedModule | Callable[[int], BalancedModule]
"""A module, whose present weights every run begins with, or a function of the seed that makes one."""
DataOrFactory = pl.LightningDataModule | tuple[Any, Any] | Callable[[int], "pl.LightningDataModule | tuple[Any, Any]"]
"""A datamodule, a pair of loaders (to train with, to evaluate with), or a function of the seed that makes either."""
TrainerFactory = Callable[[], pl.Trainer]


def only_tasks(module: BalancedModule, tasks: Collection[str]) -> BalancedModule:
    """Copy a module so that only some of its tasks train; the others count as absent from every batch.

    The copy has the same architecture and the same weights. The trunk learns from the chosen tasks alone; the other
    heads stay, untouched, so that whatever a subclass's ``task_losses``, ``forward``, ``penalties`` or
    ``configure_optimizers`` do with them goes on working: the losses of other tasks are dropped after they are
    computed. That costs their forward pass, and nothing else.

    What a subclass must see to: where tasks have loaders of their own, a batch ``{task: (inputs, target)}`` has None
    for the other tasks, as it has for a loader that has run out; an overridden ``task_losses`` must skip them. From
    batches of a form of its own it must not let other tasks' inputs reach the trunk, if that normalizes over batches.
    Losses computed from several tasks at once, ``penalties`` among them, stay as they are.

    Args:
        module: Any ``BalancedModule``, trained or not; it is left as it is.
        tasks: The names of the tasks to train.

    Raises:
        ValueError: If none is named, or one that the module does not have.

    Example:
        >>> from torch import nn
        >>> from lightning_mtl import MultiTaskModule, Task
        >>> module = MultiTaskModule(
        ...     nn.Linear(2, 2),
        ...     {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)},
        ...     {"a": Task(nn.MSELoss()), "b": Task(nn.MSELoss())},
        ... )
        >>> sorted(only_tasks(module, ["a"]).learned_tasks)
        ['a']
    """
    if isinstance(tasks, str) or not tasks or (unknown := [task for task in tasks if task not in module.tasks]):
        named = repr(tasks) if isinstance(tasks, str) or not tasks else unknown
        raise ValueError(f"only_tasks takes a list of one task or more among {list(module.tasks)}; found {named}.")
    # What a fit has left behind stays out of the copy: an unfinished window, schedulers, recorded scores.
    memo: dict[int, Any] = {
        id(module.optimization): None,
        id(module.schedules): [],
        id(module.recorder): None,
    }
    copy = deepcopy(module, memo)
    copy.recorder = Recorder(copy.tasks)
    copy.optimization = Optimization(copy.recorder)
    copy.learned_tasks = None if set(tasks) == set(copy.tasks) else frozenset(tasks)
    return copy


def train_and_score(
    module: ModuleOrFactory,
    datamodule: DataOrFactory,
    trainer_factory: TrainerFactory,
    *,
    tasks: Collection[str] | None = None,
    seed: int = 0,
    stage: EvaluationStage = "val",
    ckpt_path: str | None = None,
) -> TaskScores:
    """Train a copy of a module with a fresh Trainer, evaluate it, and return each task's scores.

    :func:`single_task_baselines` runs through it, too. So with the same arguments, a multi-task model begins with the
    weights, and sees the data in the order, that its baselines had. The random state outside is left as it was.

    A run that ends because too many steps in a row are not finite (``max_skipped_steps``) is no error here: it warns,
    and the loss of every task is NaN, so that the other seeds go on; :class:`TransferReport` shows such a seed as
    missing.

    Args:
        module: The module, left untrained, or a function of the seed that makes one.
        datamodule: A datamodule, a pair ``(train_loader, evaluation_loader)``, or a function of the seed that makes
            one of both.
        trainer_factory: Called without arguments for a Trainer that has not run. The weighting is among its callbacks.
        tasks: Train these tasks alone, as by :func:`only_tasks`; None trains all.
        seed: Of the weights, if the module is made here, of the data's order, and of everything else that is random.
        stage: Score on the datamodule's validation or test data; of a pair of loaders the second serves for both.
        ckpt_path: ``"best"`` scores the checkpoint that the Trainer's ``ModelCheckpoint`` found best; None the last
            weights.

    Raises:
        ValueError: If the Trainer has run before, or the module has not such tasks.

    Example:
        >>> train_and_score(Faces(), (loader, val_loader), trainer, seed=1)  # doctest: +SKIP
        {'age': {'loss': 0.26}, 'smile': {'loss': 0.5}}
    """
    with seeded(seed):
        made = module if isinstance(module, BalancedModule) else module(seed)
    data = made_data(datamodule, seed)
    model = only_tasks(made, made.tasks if tasks is None else tasks)
    return fit_and_score(model, data, fresh(trainer_factory()), seed=seed, stage=stage, ckpt_path=ckpt_path)


def fit_and_score(
    model: BalancedModule,
    data: pl.LightningDataModule | tuple[Any, Any],
    trainer: pl.Trainer,
    *,
    seed: int,
    stage: EvaluationStage,
    ckpt_path: str | None = None,
    watched: bool = True,
) -> TaskScores:
    """Train this very module with this Trainer under a seed, validating or not, and score the tasks that it learns."""
    evaluate = trainer.validate if stage == "val" else trainer.test
    # The module is made under the seed as well; here it begins anew, so that the data come in the same order whoever
    # made the module.
    with seeded(seed):
        try:
            if isinstance(data, pl.LightningDataModule):
                trainer.fit(model, datamodule=data)
            else:
                trainer.fit(model, data[0], data[1] if watched else None)
        except NotFiniteError as error:
            rank_zero_warn(f"The run with seed {seed} diverged and has no score: {error}")
            return diverged_scores(model.tasks if model.learned_tasks is None else model.learned_tasks)
        where = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"dataloaders": data[1]}
        evaluate(model, **where, ckpt_path=ckpt_path, verbose=False)
    return task_scores(trainer, stage)


def made_data(datamodule: DataOrFactory, seed: int) -> pl.LightningDataModule | tuple[Any, Any]:
    """Return the data of a seed, a datamodule or a pair of loaders.

    Raises:
        TypeError: If it is neither.
    """
    data: Any = datamodule
    if not isinstance(data, pl.LightningDataModule | tuple) and callable(data):
        with seeded(seed):
            data = data(seed)
    if isinstance(data, pl.LightningDataModule):
        return data
    if isinstance(data, tuple) and len(data) == 2:
        return data[0], data[1]
    raise TypeError(
        "datamodule must be a LightningDataModule, a pair (train_loader, evaluation_loader), or a function of the seed "
        f"that returns one; found {type(data).__name__}."
    )


def fresh(trainer: pl.Trainer) -> pl.Trainer:
    """Return a Trainer that has not run; refuse anything else, whose state would reach into the next run.

    Raises:
        TypeError: If it is no Trainer.
        ValueError: If it has run.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(f"trainer_factory must return a lightning.pytorch.Trainer, found {type(trainer).__name__}.")
    if trainer.state.status != TrainerStatus.INITIALIZING:
        raise ValueError(
            "trainer_factory returned a Trainer that has run before; construct a new one, with new callbacks, in each "
            "call: lambda: Trainer(...)."
        )
    return trainer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python inside the block, and put their states back after it.

    Lightning's processes seed themselves from environment variables; these are put back, too.
    """
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    with isolate_rng():
        try:
            pl.seed_everything(seed, verbose=False)
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
