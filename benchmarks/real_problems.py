"""The real data of ``do_methods_work.py``: divided by a seed, with the model that learns them and its budget."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the examples name what lies beside them

import census
import missing_labels
import multi_digits
from lightning_mtl import MultiTaskModule, Task

Loader = DataLoader[tuple[Tensor, dict[str, Tensor]]]
TRAIN_BATCH, TEST_BATCH = 128, 8192
LOWER_RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Fold:
    """What one seed trains on, what it is chosen by, and what it is tested on."""

    train: Loader
    val: Loader
    test: Loader


@dataclass(frozen=True)
class Problem:
    """Tasks on one kind of data, all classified, all scored by one metric of which more is better."""

    name: str
    tasks: tuple[str, ...]
    metric: str
    steps: int
    learning_rates: tuple[float, ...]  # to choose from: three that have most rows' choice in their midst
    fold: Callable[[int], Fold]  # of a seed
    model: Callable[[float], MultiTaskModule]  # of a learning rate


def digits(data_dir: Path | None = None) -> Problem:
    """MultiDigits, or MultiMNIST from a folder; the model is that of examples/two_digits.py."""

    @functools.cache
    def fold(seed: int) -> Fold:
        splits = multi_digits.load_splits(data_dir, seed=seed)
        return Fold(
            splits.train.loader(TRAIN_BATCH, shuffle=True),
            splits.val.loader(TEST_BATCH),
            splits.test.loader(TEST_BATCH),
        )

    overlay = multi_digits.MULTI_MNIST if data_dir else multi_digits.MULTI_DIGITS

    def model(lr: float) -> MultiTaskModule:
        accuracy = MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro")})
        return MultiTaskModule(
            nn.Sequential(nn.Flatten(), nn.Linear(overlay.size**2, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()),
            {task: nn.Linear(128, 10) for task in multi_digits.TASKS},
            {task: Task(cross_entropy, accuracy) for task in multi_digits.TASKS},
            optimizer=functools.partial(torch.optim.Adam, lr=lr),
        )

    name, rates = ("MultiMNIST", LOWER_RATES) if data_dir else ("MultiDigits", (3e-3, 1e-2, 3e-2))
    return Problem(name, multi_digits.TASKS, "accuracy", 348, rates, fold, model)


def tox21(data_dir: Path) -> Problem:
    """Twelve assays with labels missing; a seed divides the molecules 70 : 10 : 20."""
    data = missing_labels.load(data_dir, seed=0)

    @functools.cache
    def fold(seed: int) -> Fold:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        test, val = round(0.2 * len(data)), round(0.3 * len(data))
        return _fold_of(data, order[val:], order[test:val], data.at(order[:test]))

    return Problem(
        "Tox21", data.tasks, "auc", 300, LOWER_RATES, fold, functools.partial(_questions, data.tasks, data.inputs)
    )


def adult(data_dir: Path) -> Problem:
    """Two questions about people of a census; a seed takes a tenth of the training people out for validation."""
    splits = census.load_splits(data_dir)
    tasks = tuple(splits.tasks)

    def labeled(table: census.Table) -> missing_labels.Labeled:
        labels = torch.cat([table.labels[task] for task in tasks], dim=1)
        return missing_labels.Labeled(table.features, labels.long(), tasks)

    data, test = labeled(splits.train), labeled(splits.test)

    @functools.cache
    def fold(seed: int) -> Fold:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        val = len(data) // 10
        return _fold_of(data, order[val:], order[:val], test)

    return Problem("Adult", tasks, "auc", 600, LOWER_RATES, fold, functools.partial(_questions, tasks, data.inputs))


PROBLEMS: dict[str, Callable[[Path], Problem]] = {"multimnist": digits, "tox21": tox21, "adult": adult}


def _fold_of(data: missing_labels.Labeled, train: Tensor, val: Tensor, test: missing_labels.Labeled) -> Fold:
    return Fold(
        data.at(train).loader(TRAIN_BATCH, shuffle=True), data.at(val).loader(TEST_BATCH), test.loader(TEST_BATCH)
    )


def _questions(tasks: tuple[str, ...], inputs: Tensor, lr: float) -> MultiTaskModule:
    """Two hidden layers that the tasks share, and a yes or no each."""
    auc = MetricCollection({"auc": BinaryAUROC()})
    return MultiTaskModule(
        nn.Sequential(nn.Linear(inputs.shape[1], 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU()),
        {task: nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)) for task in tasks},
        {task: Task(_binary_cross_entropy, auc, missing=missing_labels.MISSING) for task in tasks},
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
    )


def _binary_cross_entropy(logits: Any, labels: Any) -> Tensor:  # noqa: ANN401 - as Task has it
    return binary_cross_entropy_with_logits(logits, labels.float())
