"""The benchmark on real data: every method trains, and a tiny run from end to end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import do_methods_work
from benchmarks.method_rows import LEFT_OUT, NAMED, REST, MakeWeighting, setup_of, takes_no_argument
from benchmarks.real_problems import PROBLEMS, Problem, digits, tox21
from lightning_mtl import weighting as methods
from lightning_mtl.tuning.comparing.plan import Candidate, Training
from lightning_mtl.tuning.comparing.rows import EQUAL, FIXED, SINGLE, Row
from lightning_mtl.tuning.comparing.setups import SetupSource
from lightning_mtl.tuning.comparing.trainings import train


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


# Training


def tiny() -> Problem:
    whole = digits()
    return replace(whole, steps=4)


def trained(problem: Problem, make: MakeWeighting, seed: int = 0) -> dict[str, float]:
    """Test scores of one training."""
    row = Row("own", "own", lambda _: make(problem))
    found = train(SetupSource(setup_of(problem)), row, Training("compare", "own", None, Candidate(0, 1e-3), seed)).test
    assert found is not None
    return {task: scores[problem.metric] for task, scores in found.items()}


@pytest.mark.parametrize(
    "name", ["UncertaintyWeighting", *(pytest.param(name, marks=pytest.mark.slow) for name in [*NAMED, *REST][1:])]
)
def test_every_row_trains(name: str) -> None:
    assert all(0 < value < 1 for value in trained(tiny(), {**NAMED, **REST}[name]).values())


def test_every_method_has_a_row_or_a_reason() -> None:
    alone = {name for name in methods.__all__ if takes_no_argument(getattr(methods, name))} - {"StaticWeights"}
    assert alone <= {*NAMED, *REST, *LEFT_OUT}


def test_partial_labels_are_read_and_learned(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "tox21_ecfp4_1024.npz",
        fp=generator.integers(0, 256, (400, 128), dtype=np.uint8),
        y=generator.integers(-1, 2, (400, 3)).astype(np.int8),
        tasks=np.array(["one", "two", "three"]),
    )
    whole = tox21(tmp_path)
    fold = whole.fold(0)
    sizes = [len(loader.dataset) for loader in (fold.train, fold.val, fold.test)]  # type: ignore[arg-type]
    assert sizes == [280, 40, 80]
    problem = replace(whole, steps=2)
    assert set(trained(problem, NAMED["MGDA"])) == {"one", "two", "three"}
    assert set(PROBLEMS) == {"multimnist", "tox21", "adult"}


@pytest.mark.slow
def test_a_tiny_run_writes_results_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "3", "--seeds", "2", "--lrs", "1e-3", "--only", "FAMO", "--results", str(tmp_path)]
    result = do_methods_work.main(arguments)
    assert [row.name for row in result.rows] == [SINGLE, EQUAL, FIXED, "FAMO"]
    report = json.loads((tmp_path / "do_methods_work_multidigits.json").read_text())
    assert {row["row"] for row in report["results"]} == {row.name for row in result.rows}
    assert {"machine", "versions", "date", "seeds"} <= set(report)
    assert (tmp_path / "do_methods_work_multidigits.png").stat().st_size > 10_000
    shown = capsys.readouterr()
    assert "2201.04122" in shown.out
    assert "compare 16/16" in shown.err  # 5 sets of fixed weights to choose from, 2 x 5 models, one with monitors
    assert do_methods_work.main(arguments).records() == result.records()
    assert "compare 1/" not in capsys.readouterr().err


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", "tox21"], "--data-dir"),
        (["--only", "Adam"], "choose from"),
        (["--only", "PIVRG"], "the tasks have none"),
        (["--seeds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            do_methods_work.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"do_methods_work\.py: .*tox21"):
        do_methods_work.main(["--data", "tox21", "--data-dir", str(tmp_path)])
