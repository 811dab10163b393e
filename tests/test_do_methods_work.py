"""The benchmark on real data: its statistics against SciPy, its rows by hand, and a tiny run from end to end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks import do_methods_work
from benchmarks.methods_report import first_at_least, rows_of, verdict
from benchmarks.real_problems import PROBLEMS, Problem, digits, tox21
from benchmarks.trials import EQUAL, NAMED, REST, SINGLE, STATIC, Method, Trial, Tuned, static_grid, train
from lightning_mtl import weighting as methods
from lightning_mtl.paired import compare, holm, t_interval


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


# Statistics


def test_intervals_and_p_values_are_scipys() -> None:
    values = {"a": [1.0, 2.5, 2.0, 4.0, 3.0], "b": [0.5, 2.6, 1.0, 3.0, 2.5]}
    found = compare(values, "b")["a"]
    expected = ttest_rel(values["a"], values["b"])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(float(expected.pvalue))
    assert found.p_corrected == pytest.approx(found.p)  # one comparison, nothing to correct
    assert found.interval == pytest.approx((0.58, float(interval.low), float(interval.high)))
    alone = ttest_1samp(values["a"], 0).confidence_interval(0.95)
    assert t_interval(values["a"])[1:] == pytest.approx((float(alone.low), float(alone.high)))


def test_holm_counts_smaller_p_values_more_often() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_what_is_alike_or_alone_is_not_significant() -> None:
    assert not compare({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "b")["a"].significant
    single = compare({"a": [1.0], "b": [5.0]}, "b")["a"]
    assert not single.significant
    assert math.isnan(single.interval.low)


# Rows


def trial(left: float, right: float, *, curve: tuple[float, ...] = (0.5,), seconds: float = 1.0) -> Trial:
    means = {10 * (place + 1): {"left": value, "right": value} for place, value in enumerate(curve)}
    return Trial(means, {"left": left, "right": right}, seconds)


def test_rows_put_single_tasks_together_and_compare_seed_by_seed() -> None:
    problem = digits()
    trained = {
        f"{SINGLE} left": Tuned(0.1, "", {s: trial(0.8, math.nan) for s in range(3)}, {"lr=0.1": 0.5}),
        f"{SINGLE} right": Tuned(0.1, "", {s: trial(math.nan, 0.5) for s in range(3)}, {}),
        EQUAL: Tuned(0.1, "", {s: trial(0.8, 0.4, curve=(0.3, 0.6, 0.5)) for s in range(3)}, {}),
        "MGDA": Tuned(0.2, "", {s: trial(0.4, 0.5, curve=(0.2, 0.4, 0.5), seconds=3.0) for s in range(3)}, {}),
    }
    own = [Method(EQUAL, {}), Method("MGDA", {})]
    single, equal, mgda = rows_of(problem, trained, own, tuning_seeds=2)
    assert single.scores == [{"left": 0.8, "right": 0.5}] * 3
    assert equal.delta_m == pytest.approx([10.0] * 3)  # right loses a fifth, left nothing
    assert mgda.delta_m == pytest.approx([25.0] * 3)
    assert [row.ranks[0] for row in (single, equal, mgda)] == [1.5, 2.25, 2.25]
    assert (equal.steps_to_reach(), mgda.steps_to_reach(), single.steps_to_reach()) == (20, 30, None)
    assert mgda.time_ratio == 3.0
    assert first_at_least(trained["MGDA"].trials[0], 0.9) is None


def test_static_grids_add_up_to_the_number_of_tasks() -> None:
    for tasks in (["a", "b"], list("abcdef")):
        grid = static_grid(tasks)
        assert len(grid) == 5
        for label in grid:
            assert sum(map(float, label.split())) == pytest.approx(len(tasks), abs=0.05)


# Training


def tiny() -> Problem:
    whole = digits()
    return replace(whole, steps=4)


def test_a_training_is_the_seeds_alone() -> None:
    one, again = (train(tiny(), methods.PCGrad(), lr=1e-3, seed=1) for _ in range(2))
    assert (one.curve, one.test) == (again.curve, again.test)
    assert one.test != train(tiny(), methods.PCGrad(), lr=1e-3, seed=2).test
    assert list(one.curve) == [1, 2, 3, 4]
    assert set(train(tiny(), None, lr=1e-3, seed=1, task="left").test) == {"left"}


@pytest.mark.parametrize(
    "name", ["UncertaintyWeighting", *(pytest.param(name, marks=pytest.mark.slow) for name in [*NAMED, *REST][1:])]
)
def test_every_row_trains(name: str) -> None:
    found = train(tiny(), {**NAMED, **REST}[name](tiny()), lr=1e-3, seed=0)
    assert all(0 < value < 1 for value in found.test.values())


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
    assert set(train(problem, methods.MGDA(), lr=1e-3, seed=0).test) == {"one", "two", "three"}
    assert set(PROBLEMS) == {"multimnist", "tox21", "adult"}


@pytest.mark.slow
def test_a_tiny_run_writes_results_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "3", "--seeds", "2", "--lrs", "1e-3", "--only", "FAMO", STATIC]
    rows = do_methods_work.main([*arguments, "--results", str(tmp_path)])
    assert [row.name for row in rows] == [SINGLE, EQUAL, STATIC, "FAMO"]
    report = json.loads((tmp_path / "do_methods_work_multidigits.json").read_text())
    assert [row["row"] for row in report["results"]] == [row.name for row in rows]
    assert {"machine", "versions", "date", "seeds"} <= set(report)
    assert len(report["results"][2]["searched_on_validation"]) == 5
    assert (tmp_path / "do_methods_work_multidigits.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "significantly better" in shown
    assert "2201.04122" in shown


def test_the_verdict_names_what_is_significant() -> None:
    changes = {
        EQUAL: [1.0, 1.1, 0.9, 1.0],
        "ahead": [-9.0, -8.9, -9.2, -9.0],
        "behind": [9.0, 9.1, 9.3, 8.9],
        "same": [1.1, 0.9, 1.0, 1.0],
    }
    lines = verdict([], {EQUAL: compare(changes, EQUAL)})
    assert lines[1].endswith("better: ahead")
    assert lines[2].endswith("worse: behind")
    assert lines[4].endswith("told apart: same")


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", "tox21"], "--data-dir"),
        (["--only", "Adam"], "choose from"),
        (["--seeds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            do_methods_work.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"do_methods_work\.py: .*tox21"):
        do_methods_work.main(["--data", "tox21", "--data-dir", str(tmp_path)])
