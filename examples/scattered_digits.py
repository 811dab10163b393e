"""Scattered digits: one real handwritten digit of any size, anywhere on a canvas, among pieces of others.

Tasks ``digit``, which of the ten it is, and ``box``, where it is: ``(left, top, right, bottom)`` as fractions of the
canvas, tight around the digit's ink. Digits are divided into training, validation and test digits first, and so are the
ones that the pieces come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from multi_digits import mnist_files, read_digits

TASKS = ("digit", "box")
Pixels = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
INK = 0.25  # of the brightest pixel


@dataclass(frozen=True)
class Scene:
    """What a canvas looks like, in pixels; ``rounds`` is how many canvases each digit gets."""

    canvas: int
    smallest: int
    largest: int
    pieces: int
    piece: int
    rounds: int


SCANS = Scene(canvas=20, smallest=8, largest=12, pieces=3, piece=4, rounds=3)  # from 8 x 8 scans
MNIST = Scene(canvas=40, smallest=14, largest=22, pieces=6, piece=7, rounds=2)  # from 28 x 28


class Scenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Canvases; an item, or a list of them, is ``(image, {"digit": class, "box": corners})``."""

    def __init__(self, images: Tensor, targets: dict[str, Tensor], digits: Tensor) -> None:
        self.images = images  # [n, 1, canvas, canvas], values from 0 to 1
        self.targets = targets  # digit [n], box [n, 4]
        self.digits = digits  # [n], which digit lies on a canvas

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {task: target[index] for task, target in self.targets.items()}

    def only(self, tasks: Sequence[str]) -> Scenes:
        """The same images with the targets of these tasks alone, for a single-task model."""
        return Scenes(self.images, {task: self.targets[task] for task in tasks}, self.digits)

    def loader(self, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
        """A loader that takes a whole batch out of the tensors at once: much faster than item by item."""
        sampler = RandomSampler(self) if shuffle else SequentialSampler(self)
        complete = shuffle and len(self) >= batch_size
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=complete), batch_size=None)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test canvases; no digit, nor a piece of one, is in two of them."""

    train: Scenes
    val: Scenes
    test: Scenes


def load_splits(data_dir: Path | None = None, *, seed: int = 0) -> Splits:
    """Scenes from scikit-learn's bundled scans, or from a folder with the MNIST files.

    Raises:
        FileNotFoundError: If the folder does not exist or lacks the files.
        ValueError: If a file is not what its name says, or holds too few digits.
    """
    random = np.random.default_rng(seed)
    if data_dir is None:
        scene, bundled = SCANS, load_digits()
        digits, labels = torch.as_tensor(bundled.images / 16, dtype=torch.float32), torch.as_tensor(bundled.target)
    else:
        scene = MNIST
        digits, labels = read_digits(mnist_files(data_dir)[0])
    if len(digits) < 20:
        raise ValueError(f"{len(digits)} digits are too few to be divided into training, validation and test digits.")
    sizes = [scaled(digits, size) for size in range(scene.smallest, scene.largest + 1)]
    order = random.permutation(len(digits))
    test, val = len(order) // 5, len(order) // 10
    parts = order[test + val :], order[test : test + val], order[:test]
    return Splits(*(draw_scenes(sizes, labels, part, scene, random) for part in parts))


def draw_scenes(
    sizes: Sequence[Pixels], labels: Tensor, chosen: Indices, scene: Scene, random: np.random.Generator
) -> Scenes:
    """Put each of the chosen digits on canvases of its own, with pieces of others from among them.

    ``sizes`` holds all digits, ``[n, side, side]``, at each size that one may have, the smallest first.
    """
    places = np.tile(chosen, scene.rounds)
    images = np.zeros((len(places), scene.canvas, scene.canvas), dtype=np.float32)
    boxes = np.zeros((len(places), 4), dtype=np.float32)
    for image, box, place in zip(images, boxes, places, strict=True):
        for other in random.choice(chosen, scene.pieces):
            top, left = random.integers(scene.smallest - scene.piece + 1, size=2)
            piece = sizes[0][other][top : top + scene.piece, left : left + scene.piece]
            paste(image, piece, *random.integers(scene.canvas - scene.piece + 1, size=2))
        ink = trimmed(sizes[int(random.integers(len(sizes)))][place])
        height, width = ink.shape
        top, left = random.integers((scene.canvas - height + 1, scene.canvas - width + 1))
        paste(image, ink, top, left)
        box[:] = left, top, left + width, top + height
    targets = {"digit": labels[torch.as_tensor(places)].long(), "box": torch.as_tensor(boxes / scene.canvas)}
    return Scenes(torch.as_tensor(images)[:, None], targets, torch.as_tensor(places))


def scaled(digits: Tensor, size: int) -> Pixels:
    resized: Pixels = interpolate(digits[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0].numpy()
    return resized


def trimmed(digit: Pixels) -> Pixels:
    """The digit without the empty rows and columns around it."""
    rows, columns = np.nonzero(digit > INK * digit.max())
    return digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def paste(image: Pixels, patch: Pixels, top: int, left: int) -> None:
    """Put a patch on an image; where they overlap the brighter pixel stays."""
    part = image[top : top + patch.shape[0], left : left + patch.shape[1]]
    np.maximum(part, patch, out=part)
