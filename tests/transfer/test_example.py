"""The example runs, shows where equal weights hurt, and leaves what it says it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import negative_transfer
from lightning_mtl.transfer import SingleTaskBaselines, TaskScores, TransferReport
from multi_digits import load_splits


def accuracies(*values: float) -> TaskScores:
    return {task: {"accuracy": value} for task, value in zip(negative_transfer.CLASSES, values, strict=True)}


def few(seed: int) -> tuple[negative_transfer.Loader, negative_transfer.Loader]:
    pairs = negative_transfer.FourTasks(load_splits(seed=seed).val)
    return pairs.loader(128, shuffle=True), pairs.loader(2048)


@pytest.mark.slow
def test_it_compares_and_leaves_picture_table_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negative_transfer, "quieten", lambda: None)  # which would quieten the other tests, too
    monkeypatch.setattr(negative_transfer, "data", few)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    negative_transfer.main(["--epochs", "1", "--repeats", "1", "--logdir", str(tmp_path)])
    shown = capsys.readouterr().out
    for expected in ("left_odd", "by affinity", "control", "Δm", "affinities group them as"):
        assert expected in shown
    folder = tmp_path / "NegativeTransfer-0" / "report"
    assert (folder / "gains.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.csv").exists()
    assert list(folder.glob("events.out.tfevents.*"))


def test_the_verdict_says_what_the_numbers_say() -> None:
    directions = {task: {"accuracy": True} for task in negative_transfer.CLASSES}
    alone = SingleTaskBaselines((0, 1), [accuracies(0.8, 0.9, 0.8, 0.9)] * 2, directions)
    equal = [accuracies(0.6, 0.9, 0.6, 0.9), accuracies(0.7, 0.91, 0.7, 0.9)]
    runs = {
        "equal weights": equal,
        "same": equal,
        "worse": [accuracies(0.5, 0.8, 0.5, 0.8)] * 2,
        "part": [accuracies(0.75, 0.9, 0.8, 0.9)] * 2,
        "whole": [accuracies(0.8, 0.9, 0.8, 0.9)] * 2,
    }
    lines = negative_transfer.verdict(TransferReport(alone, runs))
    for line, says in zip(
        lines,
        (
            "hurts left, right beyond noise",
            "no difference beyond noise",
            "worse makes it worse",
            "part mends a part of it; left still loses",
            "whole mends it: Δm changes by -9",
        ),
        strict=True,
    ):
        assert says in line


def test_labels_follow_the_digits() -> None:
    images, labels = next(iter(negative_transfer.data(0)[1]))
    assert labels["left_odd"].equal(labels["left"] % 2)
    assert labels["right_odd"].equal(labels["right"] % 2)
    assert images.shape[1:] == (10, 10)


@pytest.mark.parametrize("argument", ["--epochs", "--repeats"])
def test_arguments_below_one_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        negative_transfer.parse([argument, "0"])
    assert "must be at least 1" in capsys.readouterr().err
