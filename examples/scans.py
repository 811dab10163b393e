"""Handwritten digits with six tasks, one of which has few labels: scikit-learn's 1,797 scans of 8 x 8 pixels.

``digit``, which of the ten it is, has 30 labels in training. The others have all of theirs: ``even``; ``loop``, whether
the digit has a closed loop (0, 6, 8, 9); ``prime`` (2, 3, 5, 7); ``straight``, whether it has a straight line (1, 4, 5,
7); and ``ink``, the sum of the pixels' gray values, about 300 with a standard deviation of 35.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, WeightedRandomSampler

MAIN, INK = "digit", "ink"
GROUPS = {"even": (0, 2, 4, 6, 8), "loop": (0, 6, 8, 9), "prime": (2, 3, 5, 7), "straight": (1, 4, 5, 7)}
TASKS = (MAIN, *GROUPS, INK)
MISSING = -100  # the class that torch's cross entropy ignores
LABELED = 30
SIZES = (800, 300)  # for training and validation; the others are for the test
ScanLoader = DataLoader[tuple[Tensor, dict[str, Tensor]]]


class Scans(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scans; a list of indices gives ``(images [n, 64], {task: targets})``."""

    def __init__(self, images: Tensor, targets: dict[str, Tensor]) -> None:
        self.images = images  # [n, 64], values from 0 to 1
        self.targets = targets  # classes [n], ink [n, 1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {task: target[index] for task, target in self.targets.items()}

    def loader(self) -> ScanLoader:
        """All scans in one batch, to score on."""
        return DataLoader(
            self, sampler=BatchSampler(SequentialSampler(self), len(self), drop_last=False), batch_size=None
        )

    def training_loader(self, steps: int, batch_size: int = 64) -> ScanLoader:
        """Batches drawn at random, half of each on average from the scans whose digit is known."""
        known = self.targets[MAIN] != MISSING
        chances = torch.where(known, 1 / known.sum(), 1 / (~known).sum())
        sampler = WeightedRandomSampler(chances.tolist(), num_samples=steps * batch_size)
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=True), batch_size=None)


@dataclass(frozen=True)
class Splits:
    """Scans for training, validation and test; each is in one of them."""

    train: Scans
    val: Scans
    test: Scans


def load_splits(*, seed: int, labeled: int = LABELED) -> Splits:
    """Divide the scans at random, and keep so many of the digits' labels in training."""
    bundled = load_digits()
    images, digits = torch.as_tensor(bundled.images, dtype=torch.float32).flatten(1), torch.as_tensor(bundled.target)
    targets = {MAIN: digits}
    for task, members in GROUPS.items():
        targets[task] = torch.isin(digits, torch.tensor(members)).long()
    targets[INK] = images.sum(dim=1, keepdim=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [
        Scans(images[own] / 16, {task: target[own] for task, target in targets.items()})
        for own in order.split([*SIZES, len(order) - sum(SIZES)])
    ]
    parts[0].targets[MAIN][labeled:] = MISSING
    return Splits(*parts)
