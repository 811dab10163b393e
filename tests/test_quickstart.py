"""The quickstart: its data, its program from end to end, and what it says of differences."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import quickstart
import scans
from quickstart import ALONE, STANDARDIZED


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.setenv("COLUMNS", "100")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def test_the_targets_are_what_the_scans_show() -> None:
    splits, bundled = scans.load_splits(seed=3), load_digits()
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [800, 300, 697]
    known = {tuple(image.flatten()): int(digit) for image, digit in zip(bundled.images, bundled.target, strict=True)}
    images, targets = splits.test[range(50)]
    for row, image in enumerate(images):
        digit = known[tuple((16 * image).tolist())]
        assert int(targets["digit"][row]) == digit
        assert [int(targets[task][row]) for task in scans.GROUPS] == [
            digit % 2 == 0,
            digit in (0, 6, 8, 9),
            digit in (2, 3, 5, 7),
            digit in (1, 4, 5, 7),
        ]
        assert float(targets["ink"][row]) == float(16 * image.sum())


def test_thirty_digits_are_known_in_training_and_all_elsewhere() -> None:
    splits = scans.load_splits(seed=0)
    known = [int((part.targets["digit"] != scans.MISSING).sum()) for part in (splits.train, splits.val, splits.test)]
    assert known == [30, 300, 697]


def test_half_of_a_training_batch_has_known_digits() -> None:
    torch.manual_seed(0)
    digits = torch.cat([targets["digit"] for _, targets in scans.load_splits(seed=0).train.training_loader(200)])
    assert len(digits) == 200 * 64
    assert float((digits != scans.MISSING).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_program_trains_compares_and_says_how_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "STEPS_AN_EPOCH", 5)
    quickstart.main(["--epochs", "1", "--repeats", "2", "--weighting", "FAMO", "--logdir", str(tmp_path)])
    printed, complaints = capsys.readouterr()
    assert complaints == ""
    assert "Tip" not in printed
    assert printed.count("within noise") + printed.count("better\n") + printed.count("worse\n") == 14
    assert f"tensorboard --logdir {tmp_path}/Quickstart-0" in printed
    folder = tmp_path / "Quickstart-0"
    together = {"FAMO", "equal-weights", "standardized-ink"}
    assert {path.name for path in folder.iterdir()} == together | {f"alone-{task}" for task in scans.TASKS}
    events = EventAccumulator(str(folder / "FAMO")).Reload()
    assert set(events.Tags()["scalars"]) >= {"loss/ink", "weight/digit", "val/accuracy/even", "val/rmse/ink"}


def test_one_seed_makes_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "train", lambda *_, **__: dict.fromkeys(scans.TASKS, 1.0))
    quickstart.main(["--repeats", "1", "--logdir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "--repeats 5 can" in printed
    assert "within noise" not in printed


def test_noise_is_called_noise() -> None:
    def row(*errors: float) -> list[quickstart.Errors]:
        return [{"digit": error} for error in errors]

    rows = {ALONE: row(30.0, 31.0, 32.0), STANDARDIZED: row(30.5, 30.0, 32.1)}
    assert quickstart.difference(rows, "digit", STANDARDIZED, ALONE).endswith("within noise")
    rows[STANDARDIZED] = row(20.0, 22.0, 21.0)
    assert quickstart.difference(rows, "digit", STANDARDIZED, ALONE).endswith("better")
    assert quickstart.difference(rows, "digit", ALONE, STANDARDIZED).endswith("worse")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--weighting", "Nash"], "invalid choice: 'Nash' (choose from"),
        (["--epochs", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_wrong_options_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(argv)
    assert says in capsys.readouterr().err
