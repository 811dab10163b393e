"""The example with experts: its tables, its program from end to end, and what it says when something is wrong."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import census
import experts

ROW = "{age}, Private, 1, HS-grad, {years}, {married}, Sales, Wife, White, Female, {gain}, 0, 40, {country}, {income}"


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.setenv("COLUMNS", "120")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def write_adult(folder: Path, number: int = 24) -> None:
    """People whose age says all: an odd one earns more, and was never married below 40."""
    folder.mkdir(exist_ok=True)
    for name, dot, first in (("adult.data", "", ""), ("adult.test", ".", "|1x3 Cross validator\n")):
        rows = [
            ROW.format(
                age=30 + i,
                years=i % 16,
                married="Never-married" if i < 10 else "Divorced",
                gain=1000 * (i % 2),
                country="?" if i == 3 else "Cuba",
                income=(">50K" if i % 2 else "<=50K") + dot,
            )
            for i in range(number)
        ]
        (folder / f"{name}.gz").write_bytes(gzip.compress((first + "\n".join(rows) + "\n\n").encode()))


def test_diabetes_asks_for_what_is_not_given_and_tests_on_others() -> None:
    bundled = load_diabetes(scaled=False)
    splits = census.load_splits(seed=1)
    assert (len(splits.train), len(splits.test), splits.train.features.shape[1]) == (332, 110, 8)
    torch.testing.assert_close(splits.train.features.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(splits.train.features.std(0, correction=0), torch.ones(8))
    order = np.random.default_rng(1).permutation(442)
    glucose = bundled.data[order[110:], 9]
    assert splits.train.labels["glucose"][:, 0].tolist() == (glucose > np.median(glucose)).tolist()
    assert splits.tasks == ["progression", "glucose"]


def test_adult_is_read_as_it_comes(tmp_path: Path) -> None:
    write_adult(tmp_path)
    splits = census.load_splits(tmp_path)
    assert (len(splits.train), len(splits.test)) == (24, 24)
    assert splits.train.labels["income"][:, 0].tolist() == [i % 2 for i in range(24)]
    assert splits.test.labels["never-married"][:, 0].tolist() == [i < 10 for i in range(24)]
    # Five numbers, then one column for each value; two countries, one of them unknown.
    assert splits.train.features.shape == (24, 5 + 5 + 2)
    assert bool(splits.test.features.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("adult", [False, True])
def test_the_program_from_end_to_end(
    adult: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--epochs", "1", "--repeats", "2" if adult else "1"]
    if adult:
        write_adult(tmp_path / "adult")
        arguments += ["--data-dir", "adult"]
    experts.main(arguments)
    printed = capsys.readouterr().out
    for word in ("hard sharing", "MMoE", "PLE", "single-task", "never-married" if adult else "glucose"):
        assert word in printed
    assert ("one seed cannot tell" in printed) != adult
    folder = tmp_path / "lightning_logs" / ("Adult-0" if adult else "diabetes-0")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["MMoE-gates.png", "PLE-gates_1.png", "PLE-gates_2.png"]
    events = EventAccumulator(str(folder / "MMoE"), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("gates")) == 1


def test_what_is_wrong_with_the_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no adult.data or adult.data.gz"):
        experts.main(["--data-dir", str(tmp_path)])
    (tmp_path / "adult.data").write_text("39, State-gov\n")
    with pytest.raises(SystemExit, match=r"row 1 is '39, State-gov'; Adult has 15 columns"):
        experts.main(["--data-dir", str(tmp_path)])
