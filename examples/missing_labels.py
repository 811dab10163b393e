"""Twelve binary tasks with a sixth of the labels missing: questions about scans of digits, or Tox21.

Tox21 (Huang et al., Frontiers in Environmental Science 2016; Mayr et al., DeepTox, 2016) measured which of about 8,000
molecules disturb twelve pathways of a cell; not every molecule went through every assay. The inputs are the molecules'
fingerprints: 1,024 bits, each for some substructures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

MISSING = -1
SHARE_REMOVED = 1 / 6
EXPECTED = "tox21_ecfp4_1024.npz with fp uint8 [n, 128], y int8 [n, 12] (-1: not measured) and the names tasks"
# Twelve questions about a digit: which ones the answer is yes for.
QUESTIONS = {
    "even": "02468",
    "prime": "2357",
    "square": "0149",
    "cube": "018",
    "fibonacci": "012358",
    "power_of_2": "1248",
    "multiple_of_3": "0369",
    "below_5": "01234",
    "has_loop": "0689",
    "straight_lines": "147",
    "in_2718": "1278",
    "roman_with_v": "45678",
}


class Labeled(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Inputs and the labels of all tasks, 0, 1, or -1 where there is none."""

    def __init__(self, inputs: Tensor, labels: Tensor, tasks: Sequence[str]) -> None:
        self.inputs, self.labels, self.tasks = inputs, labels, tuple(tasks)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inputs[index], dict(zip(self.tasks, self.labels[index].unbind(-1), strict=True))

    def at(self, rows: Tensor) -> Labeled:
        return Labeled(self.inputs[rows], self.labels[rows], self.tasks)

    def of(self, task: str) -> Labeled:
        """The labeled samples of one task."""
        labels = self.labels[:, self.tasks.index(task)]
        rows = labels != MISSING
        return Labeled(self.inputs[rows], labels[rows, None], [task])

    def loader(self, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
        sampler = RandomSampler(self) if shuffle else SequentialSampler(self)
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=False), batch_size=None)


def load(data_dir: Path | None, *, seed: int) -> Labeled:
    """Tox21, or scikit-learn's digits with a sixth of the labels removed.

    Raises:
        FileNotFoundError: If the file is not in the folder.
        ValueError: If it holds something else.
    """
    if data_dir is not None:
        return load_tox21(data_dir)
    bundled = load_digits()
    yes = torch.tensor([[str(digit) in answer for answer in QUESTIONS.values()] for digit in range(10)])
    labels = yes[torch.as_tensor(bundled.target)].long()
    generator = torch.Generator().manual_seed(seed)
    removed = torch.rand(labels.shape, generator=generator) < SHARE_REMOVED
    inputs = torch.as_tensor(bundled.data / 16, dtype=torch.float32)
    return Labeled(inputs, labels.masked_fill(removed, MISSING), list(QUESTIONS))


def load_tox21(data_dir: Path) -> Labeled:
    path = next(
        (
            path
            for path in (data_dir / "tox21_ecfp4_1024.npz", data_dir / "tox21" / "tox21_ecfp4_1024.npz")
            if path.exists()
        ),
        None,
    )
    if path is None:
        raise FileNotFoundError(f"the data folder {data_dir} should hold {EXPECTED}.")
    with np.load(path) as content:
        if not {"fp", "y", "tasks"} <= set(content.files):
            raise ValueError(f"{path} holds {sorted(content.files)}; it should be {EXPECTED}.")
        inputs = torch.as_tensor(np.unpackbits(content["fp"], axis=1), dtype=torch.float32)
        return Labeled(inputs, torch.as_tensor(content["y"]).long(), [str(task) for task in content["tasks"]])


@dataclass(frozen=True)
class Splits:
    """Training and test samples."""

    train: Labeled
    test: Labeled


def split(data: Labeled, *, test_share: float, seed: int) -> Splits:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    test = round(test_share * len(data))
    return Splits(data.at(order[test:]), data.at(order[:test]))
