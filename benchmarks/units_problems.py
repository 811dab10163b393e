"""What ``units.py`` trains: data that a seed divides, and models that learn them in the targets' own units."""

from __future__ import annotations

import functools
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the examples name what lies beside them

from benchmarks.units_data import Table
from lightning_mtl import BalancedModule, MultiTaskModule, Task
from lightning_mtl.tuning.comparing.setups import declare_anew
from quickstart import DigitTasks
from scans import INK, MAIN, TASKS, Scans, Splits, load_splits

Module = TypeVar("Module", bound=BalancedModule)
Optimizer = Literal["Adam", "SGD"]
Kind = Literal["regression", "classification"]
MOMENTUM = 0.9  # of SGD
WIDTH, FEATURES = 64, 32


@dataclass(frozen=True)
class Setting:
    """What a model depends on beside its data.

    Args:
        lr: The learning rate.
        optimizer: Adam, or SGD with momentum.
        scale: What one regression's loss is multiplied by.
        divided: Whether each loss is divided by its first value.
        standardized: Whether targets of regressions are standardized.
    """

    lr: float
    optimizer: Optimizer = "Adam"
    scale: float = 1.0
    divided: bool = False
    standardized: bool = False

    @property
    def divisor(self) -> Literal["initial"] | None:
        """What the tasks are declared with."""
        return "initial" if self.divided else None

    def loss(self, task: str, scaled: str) -> Callable[[Any, Any], Tensor]:
        """The loss of a regression, one of which is scaled."""
        return Scaled(self.scale) if task == scaled and self.scale != 1 else mse_loss

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - as optimizers take them
        """The optimizer of these parameters."""
        if self.optimizer == "Adam":
            return torch.optim.Adam(parameters, lr=self.lr)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=MOMENTUM)


def relative_error(predictions: Tensor, targets: Tensor) -> float:
    """The root of the mean square error over the targets' standard deviation, in percent: 100 for their mean."""
    return 100 * float((predictions - targets).square().mean().sqrt() / targets.std(correction=0))


@dataclass(frozen=True)
class Scaled:
    """A mean squared error times a factor."""

    factor: float

    def __call__(self, prediction: Any, target: Any) -> Tensor:  # noqa: ANN401 - as Task has it
        return self.factor * mse_loss(prediction, target)


@dataclass(frozen=True)
class Errors:
    """In percent: what rates and weights are chosen by, what rows are compared by, and the scaled task's own."""

    val: float
    test: float
    scaled: float


class Problem(ABC, Generic[Module]):
    """Tasks on one kind of data, one of them a regression whose loss is scaled."""

    error: str
    """What the errors are."""
    tasks: Sequence[str]
    scaled: str
    steps: int
    rates: ClassVar[Mapping[Optimizer, tuple[float, ...]]]
    standardizes = True
    every_n_steps = 1  # in which methods of Gramians measure

    @property
    def kinds(self) -> dict[str, Kind]:
        """What ``UncertaintyWeighting`` has to know."""
        return dict.fromkeys(self.tasks, "regression")

    @abstractmethod
    def module(self, setting: Setting, seed: int) -> Module:
        """A new model; random numbers are seeded."""

    @abstractmethod
    def batches(self, seed: int) -> Any:  # noqa: ANN401 - a loader
        """The training data, one epoch that is the whole training."""

    @abstractmethod
    def errors(self, module: Module, seed: int) -> Errors:
        """How far a trained model is off."""


def trunk(inputs: int) -> nn.Sequential:
    """Two hidden layers, which all tasks share."""
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, FEATURES), nn.ReLU())


class Quickstart(Problem[MultiTaskModule]):
    """Digits with 30 labels, four yes-or-no tasks, and the scans' ink in gray values: the quickstart's, all of it."""

    error = "error of digit, %"
    tasks, scaled, steps = TASKS, INK, 300
    rates: ClassVar = {"Adam": (3e-3, 1e-2, 3e-2), "SGD": (1e-4, 1e-3, 1e-2)}

    @property
    def kinds(self) -> dict[str, Kind]:
        return {task: "regression" if task == INK else "classification" for task in TASKS}

    @functools.cache  # noqa: B019 - a problem lives as long as its process
    def splits(self, seed: int) -> Splits:
        """The quickstart's scans, divided by the seed."""
        return load_splits(seed=seed)

    def module(self, setting: Setting, seed: int) -> MultiTaskModule:
        del seed
        return ScaledDigits(setting)

    def batches(self, seed: int) -> Any:  # noqa: ANN401
        return self.splits(seed).train.training_loader(self.steps)

    def errors(self, module: MultiTaskModule, seed: int) -> Errors:
        found = {}
        for name in ("val", "test"):
            part: Scans = getattr(self.splits(seed), name)
            predictions = module(part.images)
            wrong = (predictions[MAIN].argmax(1) != part.targets[MAIN]).float().mean()
            found[name] = 100 * float(wrong), relative_error(predictions[INK], part.targets[INK])
        return Errors(found["val"][0], *found["test"])


class ScaledDigits(DigitTasks):
    """The quickstart's model, ink's loss times a factor."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(standardize=setting.standardized)
        self.setting = setting
        declare_anew(self, {task: {"loss_scale": setting.divisor} for task in TASKS})
        declare_anew(self, {INK: {"loss": setting.loss(INK, INK)}})
        self.train_task_metrics.clear()  # a fifth of the time, and nobody reads them

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.setting.make_optimizer(self.parameters())


class Tabular(Problem[MultiTaskModule]):
    """Regressions of the same inputs; a seed divides the rows 70 : 10 : 20.

    Args:
        table: The data.
        scaled: The task whose loss is scaled.
    """

    error = "mean error over standard deviation, %"
    steps, batch = 1_000, 256
    rates: ClassVar = {"Adam": (1e-3, 3e-3, 1e-2), "SGD": (1e-4, 1e-3, 1e-2)}

    def __init__(self, table: Table, scaled: str) -> None:
        self.table, self.tasks, self.scaled = table, tuple(table.targets), scaled

    @functools.cache  # noqa: B019
    def parts(self, seed: int) -> dict[str, Table]:
        """The rows for training, validation and test, inputs standardized by the first."""
        whole = self.table
        rows = torch.randperm(len(whole.inputs), generator=torch.Generator().manual_seed(seed))
        sizes = [round(0.7 * len(rows)), round(0.1 * len(rows))]
        train, val, test = rows.split([*sizes, len(rows) - sum(sizes)])
        mean, std = whole.inputs[train].mean(0), whole.inputs[train].std(0).clamp(min=1e-6)
        inputs = (whole.inputs - mean) / std
        return {
            name: Table(inputs[own], {task: target[own] for task, target in whole.targets.items()})
            for name, own in (("train", train), ("val", val), ("test", test))
        }

    def module(self, setting: Setting, seed: int) -> MultiTaskModule:
        train = self.parts(seed)["train"]
        declared = {}
        for task, target in train.targets.items():
            units = (float(target.mean()), float(target.std())) if setting.standardized else False
            loss = setting.loss(task, self.scaled)
            declared[task] = Task(loss, standardize=units, loss_scale=setting.divisor)
        return MultiTaskModule(
            trunk(train.inputs.shape[1]),
            {task: nn.Linear(FEATURES, 1) for task in self.tasks},
            declared,
            optimizer=setting.make_optimizer,
        )

    def batches(self, seed: int) -> Any:  # noqa: ANN401
        train = self.parts(seed)["train"]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.cat([torch.randperm(len(train.inputs), generator=generator) for _ in range(self.epochs(train))])
        batches = rows[: self.steps * self.batch].view(self.steps, self.batch)
        return DataLoader(train, sampler=batches, batch_size=None)

    def epochs(self, train: Table) -> int:
        """How often the steps go through the rows, rounded up."""
        return -(-self.steps * self.batch // len(train))

    def errors(self, module: MultiTaskModule, seed: int) -> Errors:
        found = {}
        for name in ("val", "test"):
            part = self.parts(seed)[name]
            predictions = module(part.inputs)
            found[name] = {task: relative_error(predictions[task], own) for task, own in part.targets.items()}
        val, test = (statistics.mean(found[name].values()) for name in ("val", "test"))
        return Errors(val, test, found["test"][self.scaled])
