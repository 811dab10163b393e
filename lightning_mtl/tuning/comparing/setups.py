"""What a comparison trains: models, data and Trainers, from a configuration or from functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.configured import ConfigurationError, MultiTaskCLI
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.method.base import Weighting
from lightning_mtl.task import Task
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.step import Optimization
from lightning_mtl.transfer.cache import LOOK_ON
from lightning_mtl.transfer.progress import without_displays
from lightning_mtl.transfer.runs import fresh, seeded
from lightning_mtl.transfer.values import digest_of
from lightning_mtl.tuning.configuration import BaseConfig, locate, other_callbacks
from lightning_mtl.tuning.identity import leaves

Loaders = tuple[Any, ...]
"""``(train, val)`` or ``(train, val, test)``."""


class Parts(NamedTuple):
    """Holds what one training needs, all of it fresh."""

    module: BalancedModule
    data: pl.LightningDataModule | Loaders
    trainer: pl.Trainer


class Source(ABC):
    """Makes what the trainings of a comparison need.

    Attributes:
        tasks: The module's tasks, as they are declared.
        rate: The learning rate that the grid is laid around.
        seed: The seed of the choices; the compared seeds follow it.
    """

    tasks: Mapping[str, Task]
    rate: float
    seed: int

    def own_methods(self) -> dict[str, dict[str, Any]]:
        """Return ``{row: class path and arguments}`` of the weightings that are configured."""
        return {}

    @abstractmethod
    def parts(self, rate: float, seed: int) -> Parts:
        """Make model, data and Trainer of a learning rate and a seed."""

    @abstractmethod
    def identity(self) -> dict[str, int | str]:
        """Return what all trainings depend on, ``{name: digest}``."""


@dataclass(frozen=True)
class Setup:
    """Holds functions that make what a comparison trains, in place of a configuration.

    Args:
        model: Called with a learning rate; returns a module. Random numbers are seeded before.
        data: Called with a seed; returns a datamodule, or loaders: ``(train, val)`` or ``(train, val, test)``.
        trainer: Called without arguments; returns a new Trainer without a weighting. Its loggers, checkpoints, early
            stopping, displays and monitors are taken out.
        lr: The learning rate that the grid is laid around.
        seed: The seed of the choices; the compared seeds follow it.

    Example:
        >>> setup = Setup(  # doctest: +SKIP
        ...     model=lambda lr: Faces(lr),
        ...     data=lambda seed: (train_loader, val_loader),
        ...     trainer=lambda: pl.Trainer(max_epochs=5),
        ...     lr=1e-3,
        ... )
    """

    model: Callable[[float], BalancedModule]
    data: Callable[[int], pl.LightningDataModule | Loaders]
    trainer: Callable[[], pl.Trainer]
    lr: float = 1e-3
    seed: int = 0


class SetupSource(Source):
    """Makes everything by the functions of a :class:`Setup`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rate, self.seed = setup.lr, setup.seed
        made = self.parts(self.rate, self.seed)
        self.tasks = made.module.tasks
        _refuse_ranks(made.trainer.world_size)

    def parts(self, rate: float, seed: int) -> Parts:
        """Call the three functions, random numbers seeded."""
        with seeded(seed):
            module = self.setup.model(rate)
        with seeded(seed):
            data: object = self.setup.data(seed)
        trainer = fresh(self.setup.trainer())
        if not isinstance(module, BalancedModule):
            raise ConfigurationError(f"Setup(model=...) must return a BalancedModule, found {type(module).__name__}.")
        if not isinstance(data, pl.LightningDataModule) and not (isinstance(data, tuple) and len(data) in (2, 3)):
            raise ConfigurationError(
                "Setup(data=...) must return a LightningDataModule, or a tuple (train, val) or (train, val, test); "
                f"found {type(data).__name__}."
            )
        if own := [type(one).__name__ for one in trainer.callbacks if isinstance(one, Weighting)]:  # type: ignore[attr-defined]
            raise ConfigurationError(
                f"Setup(trainer=...) returned a Trainer with {own[0]}; leave it out: every row brings its own."
            )
        return Parts(module, data, trainer)

    def identity(self) -> dict[str, int | str]:
        """Return digests of the functions, by their code and what they enclose, and the seed."""
        made = {"model": self.setup.model, "data": self.setup.data, "trainer": self.setup.trainer}
        return {**{name: digest_of(own)[:12] for name, own in made.items()}, "seed": self.seed}


class ConfigSource(Source):
    """Makes everything from a configuration, as ``lightning-mtl fit`` does.

    Its weighting makes a row.

    Args:
        base: The configuration.
        rate_path: Where its learning rate is; None looks in the model's optimizer.
        seed_path: Where a seed goes besides ``seed_everything``.

    Raises:
        ConfigurationError: If there is no learning rate, a path leads nowhere, or training takes several processes.
    """

    def __init__(self, base: BaseConfig, rate_path: str | None = None, seed_path: str | None = None) -> None:
        self.base, self.tasks, self.seed = base, base.tasks, base.seed
        self.seed_path = seed_path
        if seed_path is not None:
            locate(deepcopy(dict(base.values)), seed_path, said="--seed-path ")
        self.path = rate_path or "model.optimizer.lr"
        _refuse_ranks(base.world_size)
        try:
            holder, key = locate(deepcopy(dict(base.values)), self.path, said="")
            self.rate = float(holder[key])
        except (ConfigurationError, TypeError, ValueError) as error:
            like = [path for path, value in leaves(base.values, "") if _is_rate(path, value)]
            named = f"Name it with --lr-path {' or '.join(like)}" if like else "Name it with --lr-path"
            raise ConfigurationError(
                f"{self.path} is no learning rate in the configuration: {error} {named}; of an optimizer that is "
                "written as class_path and init_args: {lr: ...} it is found."
            ) from error

    def parts(self, rate: float, seed: int) -> Parts:
        """Make the objects of the configuration with this learning rate and seed."""
        values = self.base.for_scores(seed, Weighting, Checkpoint)
        holder, key = locate(values, self.path)
        holder[key] = rate
        if self.seed_path is not None:
            holder, key = locate(values, self.seed_path)
            holder[key] = seed
        with seeded(seed):
            cli = MultiTaskCLI(values, run=False, exit_on_error=False)
        return Parts(cli.model, cli.datamodule, cli.trainer)

    def own_methods(self) -> dict[str, dict[str, Any]]:
        """Return the configuration's weighting, which makes a row."""
        others = other_callbacks(self.base.values, Weighting)
        own = [entry for entry in other_callbacks(self.base.values) if entry not in others]
        return {f"{entry['class_path'].rpartition('.')[2]} (configuration)": entry for entry in own}

    def identity(self) -> dict[str, int | str]:
        """Return digests of all values of the configuration, but for rate and seed, which are in the keys."""
        values = deepcopy(dict(self.base.values))
        for path in (self.path, self.seed_path):
            if path is not None:
                holder, key = locate(values, path)
                holder[key] = path
        return {path: digest_of(value)[:12] for path, value in leaves(values, "")}


def _is_rate(path: str, value: object) -> bool:
    return isinstance(value, float) and path.rpartition(".")[2] in ("lr", "learning_rate")


def _refuse_ranks(world_size: int) -> None:
    if world_size > 1:
        raise ConfigurationError(
            f"compare trains each model on one process, and the Trainer takes {world_size}; set trainer.devices: 1, "
            "and start the same command on several machines or devices to share the work."
        )


# What writes, only looks on, or would give rows unequal budgets.
LEFT_OUT = (*LOOK_ON, Checkpoint, EarlyStopping)


def stripped(trainer: pl.Trainer) -> pl.Trainer:
    """Return the Trainer without loggers, checkpoints, early stopping, displays and monitors: it is one of many."""
    trainer.loggers = []
    kept = [one for one in without_displays(trainer).callbacks if not isinstance(one, LEFT_OUT)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    return trainer


def has_test_data(data: pl.LightningDataModule | Loaders) -> bool:
    """Return whether data have a part to test on."""
    if isinstance(data, MultiTaskDataModule):
        own = type(data).test_dataloader is not MultiTaskDataModule.test_dataloader
        return own or data.task_data("test") is not None
    if isinstance(data, pl.LightningDataModule):
        return is_overridden("test_dataloader", data, pl.LightningDataModule)
    return len(data) == 3


def declare_anew(module: BalancedModule, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Change fields of a module's tasks, with everything that was made of them when it was constructed.

    Args:
        module: A module that has not trained.
        changes: ``{task: {field: value}}``; ``standardize``, ``loss_scale`` and ``metrics`` make sense.

    Raises:
        ValueError: If there are no heads, or one cannot predict in raw units, as it is another task's, too.
    """
    for name, fields in changes.items():
        module.tasks[name] = task = replace(module.tasks[name], **fields)
        if "standardize" in fields:
            if not isinstance(module, BalancedModule):
                raise ValueError(
                    f"Task(standardize=...) is for heads of a BalancedModule, and {type(module).__name__} has none; "
                    "leave the row out."
                )
            if name not in module.the_heads:
                raise ValueError(
                    f"{type(module).__name__} has no head for {name!r}, whose output could be brought to raw units; "
                    "standardize in task_losses."
                )
            module.target_units.drop(name, module.the_heads[name])
            module.target_units.add(name, task.standardize, module.the_heads)
        if "metrics" in fields:
            for stage in ("train", "val", "test"):
                getattr(module, f"{stage}_task_metrics")[name] = task.metric_collection()
    module.recorder = Recorder(module.tasks)
    module.optimization = Optimization(module.recorder)
