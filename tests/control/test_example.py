"""examples/task_control.py: its data, and what it puts out."""

from __future__ import annotations

import pytest
import torch

import task_control


@pytest.mark.parametrize("data", [task_control.unlike_sizes, task_control.unlike_questions])
def test_no_scan_is_in_two_parts(data: object) -> None:
    (train, val, test), classes = data(1)  # type: ignore[operator]
    taught = torch.cat([part.tensors[0] for part in train.values()])
    images = torch.cat([taught, val["digit"].tensors[0], test["digit"].tensors[0]])
    assert len(images.unique(dim=0)) == len(images)
    assert list(train) == list(val) == list(test) == list(classes)


@pytest.mark.slow
def test_it_ends_with_four_tables(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        task_control.main(["--seeds", "1", "--epochs", "2"])
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for name in ("Patients", "Scans: test loss", "unlike sizes", "unlike questions", "head_only", "adaptive"):
        assert name in shown
