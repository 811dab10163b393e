"""MultiDigits and MultiMNIST: two real handwritten digits in one image, tasks ``left`` and ``right``.

The digits are divided into training, validation and test digits first and overlaid afterwards, so that no test image
holds a digit that the model has seen in training.
"""

from __future__ import annotations

import functools
import gzip
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

TASKS = ("left", "right")
PairLoader: TypeAlias = DataLoader[tuple[Tensor, dict[str, Tensor]]]
EXPECTED = "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz (the t10k-* pair too, if you have it)"


@dataclass(frozen=True)
class Overlay:
    """How two digits become one image: where the second one lies, on which canvas, and the size in the end."""

    offset: int
    canvas: int
    size: int
    rounds: int  # how many partners each digit gets


# The 8x8 scans: no resize, which would blur what little they show. 2 of 8 pixels is MultiMNIST's offset, 6 of 28. They
# are few, so each meets several partners.
MULTI_DIGITS = Overlay(offset=2, canvas=10, size=10, rounds=6)
# Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018.
MULTI_MNIST = Overlay(offset=6, canvas=36, size=28, rounds=1)


class DigitPairs(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Overlaid digits; an item, or a list of them, is ``(image, {"left": label, "right": label})``."""

    def __init__(self, images: Tensor, labels: Tensor, digits: Tensor, tasks: Sequence[str] = TASKS) -> None:
        self.images = images  # [n, height, width], values from 0 to 1
        self.labels = labels  # [n, 2]
        self.digits = digits  # [n, 2], which two digits an image was made of
        self.tasks = tuple(tasks)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {task: self.labels[index, TASKS.index(task)] for task in self.tasks}

    def only(self, tasks: Sequence[str]) -> DigitPairs:
        """The same images with the labels of these tasks alone, for a single-task model."""
        return DigitPairs(self.images, self.labels, self.digits, tasks)

    def loader(self, batch_size: int, *, shuffle: bool = False) -> PairLoader:
        """A loader that takes a whole batch out of the tensors at once: much faster than item by item.

        Shuffled, it leaves the incomplete batch at the end out, whose few images make for a gradient of mere noise.
        """
        sampler = RandomSampler(self) if shuffle else SequentialSampler(self)
        complete = shuffle and len(self) >= batch_size
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=complete), batch_size=None)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test pairs; no digit is in two of them."""

    train: DigitPairs
    val: DigitPairs
    test: DigitPairs


class MultiDigits(pl.LightningDataModule):
    """The pairs as a data module, for the command line and for searches.

    Args:
        batch_size: Images in a training batch.
        data_dir: A folder with the MNIST files, for MultiMNIST; None takes scikit-learn's scans.
        seed: How digits are divided and paired.
        tasks: Which of the two digits have labels.
    """

    def __init__(
        self, batch_size: int = 128, data_dir: Path | None = None, seed: int = 0, tasks: Sequence[str] = TASKS
    ) -> None:
        super().__init__()
        self.batch_size, self.data_dir, self.seed, self.tasks = batch_size, data_dir, seed, tuple(tasks)

    @functools.cached_property
    def splits(self) -> Splits:
        splits = load_splits(self.data_dir, seed=self.seed)
        return Splits(*(pairs.only(self.tasks) for pairs in (splits.train, splits.val, splits.test)))

    def train_dataloader(self) -> PairLoader:
        return self.splits.train.loader(self.batch_size, shuffle=True)

    def val_dataloader(self) -> PairLoader:
        return self.splits.val.loader(1000)

    def test_dataloader(self) -> PairLoader:
        return self.splits.test.loader(1000)

    def predict_dataloader(self) -> PairLoader:
        return self.splits.test.loader(1000)


def load_splits(data_dir: Path | None = None, *, seed: int = 0) -> Splits:
    """MultiDigits from scikit-learn's bundled scans, or MultiMNIST from a folder with the MNIST files.

    Raises:
        FileNotFoundError: If the folder does not exist or lacks the files.
        ValueError: If a file is not what its name says.
    """
    generator = torch.Generator().manual_seed(seed)
    test: Tensor | None = None
    if data_dir is None:
        overlay = MULTI_DIGITS
        bundled = load_digits()
        digits = torch.as_tensor(bundled.images / 16, dtype=torch.float32)
        labels = torch.as_tensor(bundled.target, dtype=torch.int64)
    else:
        overlay = MULTI_MNIST
        found = mnist_files(data_dir)
        parts = [read_digits(images) for images in found]
        digits = torch.cat([part[0] for part in parts])
        labels = torch.cat([part[1] for part in parts])
        if len(parts) == 2:
            test = torch.arange(len(parts[0][0]), len(digits))
    rest = torch.randperm(len(digits) if test is None else int(test[0]), generator=generator)
    if test is None:
        held_out = max(2, len(rest) // 5)
        test, rest = rest[:held_out], rest[held_out:]
    held_out = max(2, len(rest) // 8)
    return Splits(
        train=overlay_pairs(digits, labels, rest[held_out:], overlay, generator),
        val=overlay_pairs(digits, labels, rest[:held_out], overlay, generator),
        test=overlay_pairs(digits, labels, test, overlay, generator),
    )


def overlay_pairs(
    digits: Tensor, labels: Tensor, chosen: Tensor, overlay: Overlay, generator: torch.Generator
) -> DigitPairs:
    """Overlay each of the chosen digits, as the left one, with partners from among them, as the right one."""
    if len(chosen) < 2:
        raise ValueError(f"{len(digits)} digits are too few to be divided into training, validation and test pairs.")
    left = chosen.repeat(overlay.rounds)
    # The next one in a random order: no digit meets itself, and each is the right one as often as the left one.
    orders = [chosen[torch.randperm(len(chosen), generator=generator)] for _ in range(overlay.rounds)]
    right = torch.cat([_next_in(order, chosen) for order in orders])
    height = digits.shape[1]
    images = torch.zeros(len(left), overlay.canvas, overlay.canvas)
    images[:, :height, :height] = digits[left]
    corner = slice(overlay.offset, overlay.offset + height)
    images[:, corner, corner] = torch.maximum(images[:, corner, corner], digits[right])
    if overlay.size != overlay.canvas:
        # Nearest neighbor: the pixel of the canvas under the center of the new one.
        nearest = ((torch.arange(overlay.size) + 0.5) * overlay.canvas / overlay.size).long()
        images = images[:, nearest][:, :, nearest]
    return DigitPairs(images, torch.stack([labels[left], labels[right]], dim=1), torch.stack([left, right], dim=1))


def _next_in(order: Tensor, chosen: Tensor) -> Tensor:
    follower = torch.zeros(int(chosen.max()) + 1, dtype=torch.int64)
    follower[order] = order.roll(-1)
    return follower[chosen]


def mnist_files(data_dir: Path) -> list[Path]:
    """The files of training images and, where there is one, of test images, in a folder or one below it."""
    if not data_dir.is_dir():
        raise FileNotFoundError(f"the data folder {data_dir} does not exist; it should hold {EXPECTED}.")
    for folder in [data_dir, *sorted(path for path in data_dir.iterdir() if path.is_dir())]:
        train = sorted(folder.glob("train*-images-idx3-ubyte*"))
        if train:
            return [train[0], *sorted(folder.glob("t10k-images-idx3-ubyte*"))[:1]]
    raise FileNotFoundError(f"the data folder {data_dir} holds no MNIST images; it should hold {EXPECTED}.")


def read_digits(images: Path) -> tuple[Tensor, Tensor]:
    """The images of an IDX file, from 0 to 1, and the labels of the file that belongs to it."""
    labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    if not labels.exists():
        raise FileNotFoundError(f"{images} has no labels beside it; {labels.name} is missing.")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28) or classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{images} holds shape {list(pixels.shape)} and {labels.name} {list(classes.shape)}; "
            "MNIST has [n, 28, 28] and [n]."
        )
    return torch.as_tensor(pixels / np.float32(255)), torch.as_tensor(classes, dtype=torch.int64)


def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an IDX file of bytes, gzipped or not: a magic number, the dimensions, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, ndim = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
        if (zeros, kind) != (0, 8):
            raise ValueError(f"the type of its values is {kind:#x}")
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * ndim)
        return np.array(values.reshape(shape), dtype=np.uint8)  # a copy, which can be written to as torch demands
    except (EOFError, gzip.BadGzipFile, struct.error, ValueError) as error:
        raise ValueError(f"{path} is not an IDX file of bytes, as MNIST comes in: {error}.") from error
