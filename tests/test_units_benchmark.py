"""The benchmark of unlike units: what its rows are, its data and its budget are read right, and it goes on."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch.nn.functional import mse_loss

from benchmarks import units, units_data
from benchmarks.store import Store
from benchmarks.units_more_problems import School
from benchmarks.units_outcome import Meeting, Outcome, show
from benchmarks.units_problems import Quickstart, Setting, Tabular
from benchmarks.units_rows import DECADES, EQUAL, ROWS, SIMPLEX, STANDARDIZED, TUNED, TUNING_SEED, choose, drawn
from lightning_mtl.tuning.comparing.plan import Training


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets these for its whole process, which here is the tests'."""
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)


def table(rows: int = 60) -> units_data.Table:
    """Two regressions in units a thousand apart."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 5, generator=generator)
    targets = inputs @ torch.randn(5, 2, generator=generator) * torch.tensor([1.0, 30.0]) + 2
    return units_data.Table(inputs, {"small": targets[:, :1], "large": targets[:, 1:]})


def tabular(steps: int = 12) -> Tabular:
    problem = Tabular(table(), "large")
    problem.steps, problem.batch = steps, 16
    return problem


def cell(row: str, scale: float = 1.0, variant: int = 0, lr: float = 1e-2, steps: int = 12) -> units.Cell:
    return units.Cell(row, "Adam", scale, variant, lr, 0, steps)


# Rows


def test_fixed_weights_train_as_plain_pytorch_does() -> None:
    problem = tabular()
    found = units.train(problem, cell(DECADES, variant=2))
    weights = drawn(DECADES, problem, 3)[2]
    torch.manual_seed(0)
    module = problem.module(Setting(1e-2), 0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for inputs, targets in problem.batches(0):
        features = module.trunk(inputs)
        losses = {task: mse_loss(module.heads[task](features), target) for task, target in targets.items()}
        optimizer.zero_grad()
        torch.stack([weights[task] * loss for task, loss in losses.items()]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        part = problem.parts(0)["test"]
        features = module.trunk(part.inputs)
        errors = [
            ((module.heads[task](features) - target).square().sum() / (target - target.mean()).square().sum()).sqrt()
            for task, target in part.targets.items()
        ]
    assert found["test"] == pytest.approx(100 * float(torch.stack(errors).mean()), rel=1e-3)
    assert found["scaled"] == pytest.approx(100 * float(errors[1]), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_scale_matters_to_equal_weights_and_not_to_those_divided_by_it(scale: float) -> None:
    """Why the row of tuned weights stands at each scale."""
    problem = tabular(steps=40)
    plain, scaled = (units.train(problem, cell(EQUAL, s, steps=40))["test"] for s in (1.0, scale))
    assert abs(plain - scaled) > 1
    first, second = (units.train(problem, cell("1 / L(0)", s, steps=40))["test"] for s in (1.0, scale))
    assert first == pytest.approx(second, rel=1e-2)


def test_standardized_targets_are_predicted_in_their_own_units() -> None:
    problem = tabular(steps=150)
    assert units.train(problem, cell(STANDARDIZED, steps=150))["test"] < 60  # of 100, which their mean has
    assert units.train(problem, cell(EQUAL, steps=150))["val"] is not None


def test_every_row_trains_the_quickstarts_data() -> None:
    problem = Quickstart()
    problem.steps = 3
    for row in ROWS:
        for optimizer in row.optimizers:
            found = units.train(problem, units.Cell(row.name, optimizer, 1e-3, 0, 1e-4, 0, 3))
            assert 0 < found["test"] <= 100, row.name


def test_what_diverges_has_no_error() -> None:
    found = units.train(tabular(steps=150), units.Cell(EQUAL, "SGD", 1e3, 0, 1e3, 0, 150))
    assert found["val"] is None or found["val"] > 1e4


# Choices


@pytest.mark.parametrize("best", [1e-6, 1e-2, 3.0])
def test_a_choice_at_the_edge_widens_the_grid(best: float) -> None:
    tried = set()

    def error(training: Training) -> float:
        tried.add(training.candidate.rate)
        assert training.seed == TUNING_SEED
        rate = training.candidate.rate
        return math.inf if rate > 30 else abs(math.log(rate / best))

    candidate, least = choose("a row", (1e-3, 1e-2, 1e-1), 1, error)
    assert candidate.rate == pytest.approx(best, rel=3)
    assert min(tried) < candidate.rate < max(tried)
    assert least == min(abs(math.log(rate / best)) for rate in tried)


def test_more_draws_begin_with_the_same_sets_and_sum_to_their_number() -> None:
    problem = tabular()
    for kind in (SIMPLEX, DECADES):
        few, many = drawn(kind, problem, 4), drawn(kind, problem, 64)
        assert many[:4] == few
        assert all(sum(weights.values()) == pytest.approx(2) for weights in many)
    ratios = [abs(math.log10(w["small"] / w["large"])) for w in drawn(DECADES, problem, 64)]
    assert max(ratios) > 3


# Data


def test_a_school_is_a_regression_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    pupils = [(torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)) for n in (30, 40, 50)]
    problem = School(pupils)
    problem.steps = 2
    torch.manual_seed(0)
    module = problem.module(Setting(1e-2, scale=10.0, standardized=True), 0)
    inputs, marks = next(iter(problem.batches(0)))
    assert (inputs.shape, marks.shape) == ((3, 8, 4), (3, 8))
    train = problem.parts(0)["train"]
    for school, (task, loss) in enumerate(module.task_losses((inputs, marks)).items()):
        learned = train[school][1]
        features = module.trunk(inputs[school])
        predictions = features @ module.heads.weight[school] + module.heads.bias[school]
        expected = mse_loss(predictions, (marks[school] - learned.mean()) / learned.std())
        assert torch.allclose(loss, expected * (10 if school == 0 else 1), rtol=1e-4), task
        assert torch.allclose(module.marks(school, inputs[school]), predictions * learned.std() + learned.mean())
    assert {len(marks) for _, marks in problem.parts(0)["test"]} == {6, 8, 10}
    assert units.train(problem, cell("NashMTL"))["test"] > 0


def test_rivers_and_schools_are_read(tmp_path: Path) -> None:
    names = [f"river{i}_{when}" for when in ("before", "48H") for i in range(8)]
    rows = [[float(10 * row + column) for column in range(16)] for row in range(3)]
    lines = [f"@attribute '{name}' numeric" for name in names]
    lines += ["@data", "?," + ",".join(map(str, rows[0][1:])), *(",".join(map(str, row)) for row in rows[1:])]
    (tmp_path / "rf1").mkdir()
    with gzip.open(tmp_path / units_data.RIVERS, "wt") as file:
        file.write("\n".join(["@relation x", *lines]))
    found = units_data.rivers(tmp_path)
    assert found.inputs[:, 0].tolist() == [15.0, 10.0, 20.0]  # the mean where one is missing
    assert found.targets["river7"][:, 0].tolist() == [15.0, 25.0, 35.0]
    cells = {"X": np.empty((1, 2), object), "Y": np.empty((1, 2), object)}
    for school, number in enumerate((2, 3)):
        cells["X"][0, school], cells["Y"][0, school] = np.ones((number, 28)), np.full((number, 1), school)
    (tmp_path / "school").mkdir()
    savemat(tmp_path / units_data.SCHOOLS, cells)
    assert [(len(x), y.tolist()) for x, y in units_data.schools(tmp_path)] == [(2, [0.0] * 2), (3, [1.0] * 3)]


def test_molecules_are_described_by_what_does_not_turn_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    texts = [json.dumps(places.tolist()).replace(" ", "") for places in (at, at @ turn + 5)]
    one, other = (units_data.describe("['O','H','H']", text) for text in texts)
    assert np.allclose(one, other)
    assert one[:5].tolist() == [2, 0, 0, 1, 0]
    assert one[5:8].sum() == pytest.approx(0.5 * 8**2.4 + 1.0)  # the trace
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (tmp_path / "qm9").mkdir()
    for part in (1, 2, 3):
        with (tmp_path / "qm9" / f"qm9_part{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["Elements", "XYZ_Ang", *units_data.TARGETS.values()])
            writer.writeheader()
            row = dict.fromkeys(units_data.TARGETS.values(), part)
            writer.writerows([{"Elements": "['O','H','H']", "XYZ_Ang": texts[0], **row}] * 14)
    found = units_data.molecules(tmp_path)
    assert found.inputs.shape == (3, 35)
    assert found.targets["U0"][:, 0].tolist() == [1.0, 2.0, 3.0]


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"units\.py: rf1/rf1\.arff\.gz is needed, and no --data-dir"):
        units.main(["--data", "rf1", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no such file"):
        units.main(["--data", "school", "--data-dir", str(tmp_path), "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        units.parse(["--seeds", "0"])
    assert "--seeds must be at least 1" in capsys.readouterr().err


# The outcome


def result(row: str, seed: int, test: float, **fields: Any) -> dict[str, Any]:
    whole = {"row": row, "optimizer": "Adam", "scale": 1.0, "variant": 0, "lr": 1e-2, "seed": seed, "steps": 1}
    return whole | {"val": test, "test": test, "scaled": test} | fields


def test_where_random_weights_meet_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    noise = [0.0, 1.0, -1.0]
    outcome = Outcome(tabular(), (1.0,))
    outcome.curves = [result("MGDA", seed, 20.0) for seed in range(3)]
    outcome.curves += [result(EQUAL, seed, 50.0 + noise[seed]) for seed in range(3)]
    for n, mean in ((1, 40.0), (4, 21.0), (16, 20.0), (64, 15.0)):
        outcome.draws[SIMPLEX, n] = [result(SIMPLEX, seed, mean + noise[seed]) for seed in range(3)]
    outcome.tuned = outcome.draws[SIMPLEX, 64]
    assert outcome.meetings(SIMPLEX) == {"MGDA": Meeting(told_apart=4, ahead=16)}
    assert outcome.meetings(DECADES) == {}
    assert outcome.against((EQUAL, "Adam"), 1.0)["MGDA", "Adam"].interval.mean == -30
    outcome.results = [result("MGDA", TUNING_SEED, 1.0, lr=lr) for lr in (1e-3, 1e-2)]
    (line,) = outcome.edges()
    assert line == "MGDA, Adam, times 1: 0.01 of 0.001, 0.01"
    show(outcome)
    assert "as good in the mean from n = 16, not told apart from n = 4" in capsys.readouterr().out


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(units, "DRAWS", (1, 2))
    monkeypatch.setitem(units.PROBLEMS, "rf1", lambda _: tabular())
    short = ["--data", "rf1", "--steps", "4", "--results", str(tmp_path)]
    begun = units.main([*short, "--seeds", "1", "--only", "equal weights, Adam", "--minutes", "0"])
    assert not begun["rf1"].curves
    assert "goes on from here" in capsys.readouterr().out
    once = units.main([*short, "--seeds", "1", "--only", "equal weights, Adam"])
    trained = len(json.loads((tmp_path / "units_rf1.json").read_text())["results"])
    twice = units.main([*short, "--seeds", "2", "--only", "equal weights, Adam", "standardized, Adam", "fixed"])
    held = json.loads((tmp_path / "units_rf1.json").read_text())
    assert trained < len(held["results"])
    assert {"machine", "versions", "date", "data", "error"} <= held.keys()
    label = (EQUAL, "Adam")
    assert once["rf1"].table()[label][1e3][0] == twice["rf1"].table()[label][1e3][0]
    assert set(twice["rf1"].table()) == {label, (STANDARDIZED, "Adam"), (TUNED, "Adam")}
    assert {len(errors) for by in twice["rf1"].table().values() for errors in by.values()} == {2}
    keys = [units.Runner.key(one) for one in held["results"]]
    assert len(keys) == len(set(keys))
    assert (tmp_path / "units_rf1.png").read_bytes().startswith(b"\x89PNG")


def test_a_store_is_whole_and_keeps_what_it_says_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    store = Store(path, {"data": "of a test"})
    store.add({"a": 1, "b": None})
    store.add({"a": 2, "b": None})
    again = Store(path, {"data": "another"})
    assert again.results == [{"a": 1, "b": None}, {"a": 2, "b": None}]
    assert again.about["data"] == "of a test"
    assert len(path.read_text().splitlines()[-4:]) == 4
    assert not path.with_suffix(".part").exists()
