"""Results as tables, rows, data frames and pictures, and callbacks that print as the call that made them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from lightning_mtl import Monitor, Weighting, monitors, weighting
from lightning_mtl.architectures.cost_report import Cost, ParameterReport
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.monitors import GradientConflict, TaskAffinity
from lightning_mtl.monitors.pairs import PairMeans
from lightning_mtl.monitors.report import Report
from lightning_mtl.transfer import ProbeResult, SingleTaskBaselines, TransferReport
from lightning_mtl.tuning.result import Result
from lightning_mtl.tuning.space import read_space


def transfer() -> TransferReport:
    alone = SingleTaskBaselines((0, 1), ({"a|<b>": {"e": 4.0}}, {"a|<b>": {"e": 5.0}}), {"a|<b>": {"e": False}})
    return TransferReport(alone, {"equal": [{"a|<b>": {"e": 5.0}}, {"a|<b>": {"e": 5.5}}]})


def parameters() -> ParameterReport:
    both, age = Cost("all", 107, 40, 67, 560, 0.5), Cost("age", 49, 40, 9, 400, 0.25)
    return ParameterReport(both, {"age": age, "smile": age}, idle=0, assumption="Made up.")


def affinities() -> Report:
    monitor = TaskAffinity()
    monitor.tasks, monitor.whole = ("a", "b"), PairMeans(2)
    monitor.whole.add(torch.tensor([[2e-4, 1e-4], [-1e-4, 4e-4]], dtype=torch.float64), [0, 1])
    return monitor.report()


def search() -> Result:
    study = optuna.create_study(study_name="s", direction="minimize")
    for value in (3.0, 1.0, 2.0):
        study.add_trial(optuna.trial.create_trial(value=value))
    return Result(study, read_space({"objective": "val/loss/total", "parameters": {"x": [1, 2]}}), ["a"], {}, ())


REPORTS: dict[str, Callable[[], Report]] = {
    "transfer": transfer,
    "parameters": parameters,
    "affinities": affinities,
    "search": search,
    "probe": lambda: ProbeResult("age", "loss", False, [10, 20], [[0.5, 0.7]] * 2, [[0.9, 0.8]] * 2),
}


class Cells(HTMLParser):
    """The texts of a table's cells, by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.get_starttag_text() not in (None, "<p>"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_the_same_table_in_the_notebook_and_in_markdown(name: str) -> None:
    report = REPORTS[name]()
    cells = Cells()
    cells.feed(report._repr_html_())
    lines = [line for line in report.markdown().splitlines() if line.startswith("|") and "---" not in line]
    wanted = [[cell.strip().strip("*") for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines]
    assert [[cell.replace("|", "¦").strip() for cell in row] for row in cells.rows] == wanted
    assert len(wanted) > 1


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_gives_its_rows_to_pandas_and_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = REPORTS[name]()
    columns, rows = report.records()
    assert rows
    assert all(len(row) == len(columns) for row in rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        report.to_frame()
    pandas = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert report.to_frame() == (rows, list(columns))
    assert report.figure().axes


def test_affinities_are_shown_in_units_of_the_tasks_own_steps(tmp_path: Path) -> None:
    report = affinities()
    report.to_csv(tmp_path / "pairs.csv")
    assert (tmp_path / "pairs.csv").read_text().splitlines() == [
        "a step for,a,b",
        "a,0.0002,0.0001",
        "b,-0.0001,0.0004",
    ]
    assert [line.split("|")[2:4] for line in report.markdown().splitlines()[2:4]] == [
        [" +1.00 ", " +0.25 "],
        [" -0.50 ", " +1.00 "],
    ]


def test_the_search_lists_the_best_first() -> None:
    assert [row[:3] for row in search().records()[1]] == [
        (0, "complete", 3.0),
        (1, "complete", 1.0),
        (2, "complete", 2.0),
    ]
    assert [row[0].text for row in search().shown().grid.rows] == ["1", "2", "0"]


class Custom(Weighting):
    def __init__(self, beta: float | torch.Tensor, *rest: int, label: str = "x", **common: Any) -> None:
        super().__init__(**common)

    def weigh(self, signals: Any) -> torch.Tensor:
        return signals.losses  # type: ignore[no-any-return]


class Silent(Monitor):
    pass


@pytest.mark.parametrize(
    ("made", "printed"),
    [
        (lambda: weighting.GradNorm(alpha=0.5), "GradNorm(alpha=0.5)"),
        (lambda: weighting.GradNorm(1.5, importance={"a": 2.0}), "GradNorm(importance={'a': 2.0})"),
        (lambda: weighting.Frozen(weighting.DWA(), 10), "Frozen(weighting=DWA(), steps=10)"),
        (weighting.GradDrop, "GradDrop()"),
        (lambda: Custom(0.5, total=2.0), "Custom(beta=0.5, total=2.0)"),
        (lambda: Custom(beta=torch.ones(2)), "Custom(beta=tensor([1., 1.]))"),
        (Silent, "Silent()"),
        (lambda: GradientConflict(10, at="features"), "GradientConflict(every_n_steps=10, at='features')"),
        (monitors.Throughput, "Throughput()"),
        (
            lambda: TaskLearningRate(Importance({"a": 2.0})),
            "TaskLearningRate(factors=Importance(weights={'a': 2.0}))",
        ),
    ],
)
def test_callbacks_print_as_the_call_that_made_them(made: Callable[[], object], printed: str) -> None:
    assert repr(made()) == printed
