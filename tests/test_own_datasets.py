"""examples/own_datasets.py: its data, its budget, and what it puts out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import own_datasets


def test_no_scan_is_in_two_datasets() -> None:
    train, test = own_datasets.scans(seed=1)
    assert {task: len(part) for task, part in train.items()} == own_datasets.SAMPLES
    parts = [*train.values(), test["digit"]]
    assert sum(map(len, parts)) == 1797
    images = torch.cat([part.tensors[0] for part in parts])
    assert len(images.unique(dim=0)) == len(torch.as_tensor(load_digits().data).unique(dim=0))


@pytest.mark.parametrize("name", own_datasets.MODES)
def test_every_mode_gets_as_many_batches(name: str) -> None:
    data = own_datasets.data_module(own_datasets.MODES[name], batches=60, seed=0)
    loader = data.train_dataloader()
    assert own_datasets.EPOCHS * sum(len(batch) for batch in loader) == 60


@pytest.mark.slow
def test_it_ends_with_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_datasets.main(["--batches", "15", "--seeds", "1", "--logdir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(name in shown for name in own_datasets.MODES)
    assert (tmp_path / "OwnDatasets-0" / "own_datasets.png").stat().st_size > 10_000
    versions = {path.name for path in (tmp_path / "OwnDatasets-0").iterdir() if path.is_dir()}
    assert versions == {"comparison", *(name.replace(" ", "-") for name in own_datasets.MODES)}


def test_too_few_batches_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        own_datasets.main(["--batches", "3"])
    assert "--batches must be at least 15" in capsys.readouterr().err
