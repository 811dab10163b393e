"""The examples of detection and of partial labels: their data, and their programs from end to end on a tiny budget."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import detection
import missing_labels
import partial_labels
import scattered_digits


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs set these for their whole process, which here is the tests'."""
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def pictures_in(folder: Path) -> set[str]:
    found = set()
    for events in folder.rglob("events.out.tfevents*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        found |= set(accumulator.Tags()["images"])
    return found


# Detection


def test_boxes_are_tight_around_the_brightest_digit_and_no_digit_is_in_two_splits() -> None:
    scene = dataclasses.replace(scattered_digits.SCANS, pieces=0, rounds=1)
    digits = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [scattered_digits.scaled(digits, size) for size in range(scene.smallest, scene.largest + 1)]
    random = np.random.default_rng(0)
    scenes = scattered_digits.draw_scenes(sizes, torch.arange(6), np.arange(6), scene, random)
    for index in range(6):
        image, targets = scenes[index]
        left, top, right, bottom = (scene.canvas * targets["box"]).round().int().tolist()
        assert targets["digit"] == index
        inside = image[0, top:bottom, left:right]
        torch.testing.assert_close(inside.sum(), image.sum())
        assert all(bool((edge > 0).any()) for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    splits = scattered_digits.load_splits(seed=1)
    train, val, test = (set(part.digits.tolist()) for part in (splits.train, splits.val, splits.test))
    assert len(train) + len(val) + len(test) == 1797
    assert len(train | val | test) == 1797


def test_iou_of_boxes() -> None:
    one = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 1.0, 1.0]])
    other = torch.tensor([[0.0, 0.25, 0.5, 0.75], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 1.0, 1.0]])
    expected = torch.tensor([1 / 3, 0.0, 1.0])
    torch.testing.assert_close(detection.iou(one, other), expected)
    metric = detection.MeanIoU()
    metric.update(one, other)
    torch.testing.assert_close(metric.compute(), expected.mean())


@pytest.mark.slow
def test_detection_ends_with_a_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = dataclasses.replace(scattered_digits.SCANS, rounds=1)
    monkeypatch.setattr(scattered_digits, "SCANS", few)
    monkeypatch.setattr(detection, "SHOWN", 2)
    detection.main(["--epochs", "1", "--repeats", "1", "--logdir", str(tmp_path)])
    written = capsys.readouterr().out
    for words in ("Test images, one seed", "IMTLL", "equal weights", "single-task", "mean IoU %"):
        assert words in written
    assert (tmp_path / "Detection-0" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert "predictions" in pictures_in(tmp_path)


def test_mnist_files_become_scenes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(40, 28, 28), dtype=np.uint8)
    for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(40, dtype=np.uint8) % 10)):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    splits = scattered_digits.load_splits(tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [56, 8, 16]
    assert splits.test.images.shape[1:] == (1, 40, 40)


# Partial labels


def test_a_sixth_of_the_labels_is_removed_and_the_others_answer_their_questions() -> None:
    data = missing_labels.load(None, seed=0)
    missing = (data.labels == missing_labels.MISSING).float().mean()
    assert float(missing) == pytest.approx(1 / 6, abs=0.01)
    whole = torch.stack([missing_labels.load(None, seed=seed).labels for seed in range(5)]).max(0).values
    _, labels = data[0]  # a scan of a 0
    assert {task for task, label in zip(data.tasks, whole[0], strict=True) if label == 1} == {
        task for task, digits in missing_labels.QUESTIONS.items() if "0" in digits
    }
    assert list(labels) == list(missing_labels.QUESTIONS)
    alone = data.of("prime")
    assert alone.tasks == ("prime",)
    assert set(alone.labels.unique().tolist()) == {0, 1}


def test_partial_labels_ends_with_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial_labels.main(["--steps", "8", "--repeats", "1", "--logdir", str(tmp_path)])
    written = capsys.readouterr().out
    for words in ("GradNorm", "equal weights", "single-task", "labeled %", "has_loop", "points of mean ROC-AUC"):
        assert words in written
    assert (tmp_path / "PartialLabels-0" / "auc.png").read_bytes().startswith(b"\x89PNG")
    assert "ROC-AUC" in pictures_in(tmp_path)


def test_tox21_is_read_as_it_comes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(-1, 2, size=(60, 12), dtype=np.int8)
    np.savez(
        tmp_path / "tox21_ecfp4_1024.npz",
        fp=random.integers(256, size=(60, 128), dtype=np.uint8),
        y=labels,
        tasks=np.array([f"NR-{index}" for index in range(12)]),
    )
    data = missing_labels.load(tmp_path, seed=0)
    assert data.inputs.shape == (60, 1024)
    assert data.labels.tolist() == labels.tolist()
    assert data.tasks[3] == "NR-3"


@pytest.mark.parametrize("program", [detection, partial_labels])
def test_a_missing_data_folder_takes_one_line(program: object, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^(detection|partial_labels)\.py: the data folder .*should hold") as refused:
        program.main(["--data-dir", str(tmp_path / "nowhere")])  # type: ignore[attr-defined]
    assert "\n" not in str(refused.value)
