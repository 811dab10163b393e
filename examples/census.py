"""Tables of people with two yes-or-no questions each: the census of UCI Adult, and scikit-learn's diabetes patients."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
# Of the rest, fnlwgt is the survey's weight of a person, education-num says the same as education, and the last column
# and marital-status are what is asked for.
CATEGORIES = ("workclass", "occupation", "relationship", "race", "sex", "native-country")
SKEWED = ("capital-gain", "capital-loss")


class Table(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """People; an item, or a list of them, is ``(features, {task: 0 or 1})``."""

    def __init__(self, features: Tensor, labels: dict[str, Tensor]) -> None:
        self.features = features  # [n, d]
        self.labels = labels  # [n, 1] each

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.features[index], {task: labels[index] for task, labels in self.labels.items()}

    def loader(self, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
        """A loader that takes a whole batch out of the table at once."""
        sampler = RandomSampler(self) if shuffle else SequentialSampler(self)
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=False), batch_size=None)


@dataclass(frozen=True)
class Splits:
    """People to learn from and people to be tested on."""

    name: str
    train: Table
    test: Table

    @property
    def tasks(self) -> list[str]:
        return list(self.train.labels)


def load_splits(data_dir: Path | None = None, *, seed: int = 0) -> Splits:
    """Adult from a folder with its files, in the division that it comes in; without a folder the diabetes patients.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If a file is not what its name says.
    """
    return diabetes(seed) if data_dir is None else adult(data_dir)


def diabetes(seed: int) -> Splits:
    """442 patients: was the disease's progression after a year, and is the blood's glucose, above the median?

    Eight measures are given: age, sex, body mass index, blood pressure and four of the blood. Triglycerides are left
    out with glucose, which they go along with.
    """
    bundled = load_diabetes(scaled=False)
    glucose = bundled.feature_names.index("s6")
    given = [i for i, name in enumerate(bundled.feature_names) if name not in ("s5", "s6")]
    values = {"progression": bundled.target, "glucose": bundled.data[:, glucose]}
    order = np.random.default_rng(seed).permutation(len(bundled.target))
    test, train = np.split(order, [len(order) // 4])
    labels = {task: value > np.median(value[train]) for task, value in values.items()}
    return Splits("diabetes", *standardized(bundled.data[:, given], labels, train, test))


def adult(data_dir: Path) -> Splits:
    """Adult's 48,842 people: do they earn more than 50,000 dollars, and were they never married?"""
    parts = [read_adult(find(data_dir, name)) for name in ("adult.data", "adult.test")]
    rows = [row for part in parts for row in part]
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(COLUMNS)}
    train, test = np.split(np.arange(len(rows)), [len(parts[0])])
    features = []
    for name in NUMBERS:
        numbers = columns[name].astype(np.float64)
        features.append(np.log1p(numbers) if name in SKEWED else numbers)
    for name in CATEGORIES:
        features += [columns[name] == value for value in np.unique(columns[name][train])]
    labels = {
        "income": columns["income"] == ">50K",
        "never-married": columns["marital-status"] == "Never-married",
    }
    return Splits("Adult", *standardized(np.stack(features, axis=1), labels, train, test))


def standardized(
    features: np.ndarray, labels: dict[str, np.ndarray], train: np.ndarray, test: np.ndarray
) -> tuple[Table, Table]:
    """Both tables, each feature with mean 0 and deviation 1 over the first."""
    values = np.asarray(features, dtype=np.float64)
    spread = values[train].std(0)
    values = (values - values[train].mean(0)) / np.where(spread > 0, spread, 1)

    def table(chosen: np.ndarray) -> Table:
        found = {task: torch.as_tensor(label[chosen], dtype=torch.float32)[:, None] for task, label in labels.items()}
        return Table(torch.as_tensor(values[chosen], dtype=torch.float32), found)

    return table(train), table(test)


def find(data_dir: Path, name: str) -> Path:
    for path in (data_dir / f"{name}.gz", data_dir / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"the data folder {data_dir} holds no {name} or {name}.gz, as UCI Adult comes in.")


def read_adult(path: Path) -> list[list[str]]:
    """The rows of a file of Adult's: comments and empty lines left out, and the full stop that ends the test labels."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line for line in content.decode().splitlines() if line.strip() and not line.startswith("|")]
    rows = [[value.strip() for value in line.rstrip(".").split(",")] for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS) or row[-1] not in ("<=50K", ">50K"):
            raise ValueError(
                f"{path}: row {number} is {', '.join(row)!r}; Adult has {len(COLUMNS)} columns, income last."
            )
    return rows
