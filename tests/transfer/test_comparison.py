"""The report's numbers against slow computations by hand, and what it looks like wherever it is shown."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_mtl.metrics import bootstrap_interval
from lightning_mtl.monitors.figures import draw_intervals
from lightning_mtl.transfer import SingleTaskBaselines, TransferReport
from tests.training import Memory, quiet_trainer

DIRECTIONS = {"a": {"accuracy": True, "error": False}, "b": {"loss": False}}
ALONE = SingleTaskBaselines(
    seeds=(0, 1, 2),
    scores=[{"a": {"accuracy": 0.8 + s / 100, "error": 4.0 + s}, "b": {"loss": 2.0 - s / 10}} for s in range(3)],
    higher_is_better=DIRECTIONS,
)
RUNS: dict[str, list[dict[str, dict[str, float]]]] = {
    "equal": [{"a": {"accuracy": 0.7, "error": 5.0 + s}, "b": {"loss": 1.0, "other": 3.0}} for s in range(3)],
    "MGDA": [{"a": {"accuracy": 0.9, "error": 5.0 + s}, "b": {"loss": 1.5}} for s in range(3)],
}


@pytest.fixture
def report() -> TransferReport:
    return TransferReport(ALONE, RUNS)


def relative_gains(run: str, task: str) -> list[float]:
    """Each seed's gain in percent, metric by metric."""
    gains = []
    for together, alone in zip(RUNS[run], ALONE.scores, strict=True):
        changes = [
            100 * (together[task][m] - alone[task][m]) / alone[task][m] * (1 if up else -1)
            for m, up in DIRECTIONS[task].items()
        ]
        gains.append(statistics.mean(changes))
    return gains


@pytest.mark.parametrize("run", ["equal", "MGDA"])
def test_gains_and_delta_m_are_means_over_seeds_of_pairs(report: TransferReport, run: str) -> None:
    for task in "ab":
        assert report.gain(run, task).mean == pytest.approx(statistics.mean(relative_gains(run, task)))
        assert report.gain(run, task) == pytest.approx(bootstrap_interval(relative_gains(run, task)))
    # Every metric counts once, so the task with two of them counts twice.
    per_seed = [-(2 * a + b) / 3 for a, b in zip(relative_gains(run, "a"), relative_gains(run, "b"), strict=True)]
    assert report.delta_m(run) == pytest.approx(bootstrap_interval(per_seed))


def test_runs_are_ranked_with_every_seed_and_ties_shared(report: TransferReport) -> None:
    # accuracy: MGDA first; error: a tie; loss: equal first.
    assert report.mean_rank("equal") == pytest.approx((1.5, 1.5, 1.5))
    assert report.mean_rank("MGDA").mean == pytest.approx((1 + 1.5 + 2) / 3)


def test_two_runs_are_compared_in_pairs(report: TransferReport) -> None:
    compared = report.compare("MGDA", "equal")
    assert compared.mean == pytest.approx(report.delta_m("MGDA").mean - report.delta_m("equal").mean)
    assert report.compare("equal", "equal") == (0, 0, 0)


def test_every_interval_has_the_confidence_asked_for() -> None:
    scattered = [{**own, "b": {"loss": loss}} for own, loss in zip(RUNS["equal"], (1.0, 3.0, 1.8), strict=True)]
    report = TransferReport(ALONE, {"scattered": scattered, "MGDA": RUNS["MGDA"]}, confidence=0.5)
    wider = TransferReport(ALONE, {"scattered": scattered, "MGDA": RUNS["MGDA"]}, confidence=0.99)
    for narrow, wide in (
        (report.gain("scattered", "b"), wider.gain("scattered", "b")),
        (report.delta_m("scattered"), wider.delta_m("scattered")),
        (report.mean_rank("scattered"), wider.mean_rank("scattered")),
        (report.compare("scattered", "MGDA"), wider.compare("scattered", "MGDA")),
    ):
        assert narrow.high - narrow.low < wide.high - wide.low


def test_the_difference_of_two_runs_is_narrower_than_theirs_apart() -> None:
    hard = [{"a": {"accuracy": 0.7, "error": 5.0 + s}, "b": {"loss": loss}} for s, loss in enumerate((1.0, 9.0, 3.0))]
    harder = [{**own, "b": {"loss": own["b"]["loss"] + 0.2}} for own in hard]
    compared = TransferReport(ALONE, {"hard": hard, "harder": harder}).compare("harder", "hard")
    assert 0 < compared.low <= compared.high < 10  # percent; alone the seeds are hundreds apart


def test_what_hurts_and_what_helps_is_named(report: TransferReport) -> None:
    assert report.hurt("equal") == ["a"]
    assert report.helped("equal") == ["b"]
    noisy = [{**scores, "b": {"loss": loss}} for scores, loss in zip(RUNS["equal"], (1.0, 3.0, 1.8), strict=True)]
    assert TransferReport(ALONE, {"equal": noisy}).helped("equal") == []


def test_the_console_and_markdown_show_the_same_numbers(report: TransferReport) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.table())
    shown, markdown = console.export_text(), report.markdown()
    for expected in ("accuracy 0.81, error 5", "loss 1.9", "+47.3", "[+44.4, +50.0]", "mean rank", "over 3 seeds"):
        assert expected in shown, expected
        assert expected in markdown, expected
    assert "**+47.3 [+44.4, +50.0]**" in markdown
    assert len({line.count("|") for line in markdown.splitlines()[:6]}) == 1


def test_names_with_markup_are_shown_as_they_are(report: TransferReport) -> None:
    strange = TransferReport(ALONE, {"[bold]a|b[/bold]": RUNS["equal"]})
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(strange.table())
    assert "[bold]a|b[/bold]" in console.export_text()
    assert "[bold]a\\|b[/bold]" in strange.markdown()


def test_the_csv_has_every_number(report: TransferReport, tmp_path: Path) -> None:
    report.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["run"], row["quantity"], row["task"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (2 + 1 + 1) + 3 * 3
    gain = found["equal", "gain", "a", ""]
    assert [float(gain[key]) for key in ("mean", "low", "high")] == pytest.approx(report.gain("equal", "a"))
    assert float(found["alone", "score", "a", "error"]["mean"]) == 5
    assert float(found["MGDA", "delta_m", "", ""]["mean"]) == report.delta_m("MGDA").mean


def test_tensorboard_gets_table_picture_and_numbers(report: TransferReport, tmp_path: Path) -> None:
    memory = Memory()
    trainer = quiet_trainer(logger=[TensorBoardLogger(tmp_path, name="", version=""), memory])
    report.log(trainer, step=7)
    for logger in trainer.loggers:
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("transfer/gain/MGDA/a")[0].value == pytest.approx(report.gain("MGDA", "a").mean, rel=1e-6)
    assert events.Scalars("transfer/delta_m/MGDA")[0].step == 7
    assert "| Δm, % " in events.Tensors("transfer/text_summary")[0].tensor_proto.string_val[0].decode()
    assert events.Images("transfer")
    assert memory.lines[0][1]["transfer/delta_m/equal"] == report.delta_m("equal").mean
    report.log(CSVLogger(tmp_path / "csv"), figure=False)
    with pytest.raises(ValueError, match="a Trainer without a logger"):
        report.log(quiet_trainer())


def with_seed(scores: Any, place: int, task: str, **changed: float) -> list[dict[str, dict[str, float]]]:
    """The scores of a run, with other ones of a task under one seed."""
    return [{**own, task: {**own[task], **changed}} if i == place else own for i, own in enumerate(scores)]


def test_pairs_are_over_the_seeds_that_every_row_finished(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    # An accuracy of NaN predictions is a number, and no result.
    runs = {**RUNS, "lost": with_seed(RUNS["MGDA"], 1, "a", loss=nan), "none": [*RUNS["equal"]]}
    for place, value in enumerate((nan, inf, -inf)):
        runs["none"] = with_seed(runs["none"], place, "b", loss=value)
    report = TransferReport(ALONE, runs)
    left = [0, 2]
    of_left = TransferReport(
        SingleTaskBaselines((0, 2), [ALONE.scores[i] for i in left], DIRECTIONS),
        {run: [runs[run][i] for i in left] for run in ("equal", "MGDA")} | {"lost": [RUNS["MGDA"][i] for i in left]},
    )
    assert report.seeds == (0, 2)
    assert report.finished("lost") == (0, 2)
    assert report.finished("equal") == report.finished() == (0, 1, 2)
    for run in ("equal", "MGDA", "lost"):
        assert report.delta_m(run) == of_left.delta_m(run)
        assert report.mean_rank(run) == of_left.mean_rank(run)
        assert report.compare(run, "equal") == of_left.compare(run, "equal")
        assert [report.gain(run, task) for task in "ab"] == [of_left.gain(run, task) for task in "ab"]
        assert report.hurt(run) == of_left.hurt(run)
    assert np.isnan([report.delta_m("none"), report.mean_rank("none"), report.compare("equal", "none")]).all()
    assert report.hurt("none") == report.helped("none") == []

    shown = report.markdown()
    assert "| lost (2 of 3 seeds) | none (0 of 3 seeds) |" in " ".join(shown.split())
    assert "| equal |" in " ".join(shown.split())
    assert "over the seeds that every column with any finished: 0, 2." in shown
    assert "nan" not in shown
    assert "diverged" not in TransferReport(ALONE, RUNS).markdown()
    labels = [container.get_label() for container in report.figure().axes[0].containers]
    assert labels == ["equal", "MGDA", "lost (2 of 3 seeds)", "none (0 of 3 seeds)"]
    report.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counted = {run: {(row["seeds"], row["finished"]) for row in rows if row["run"] == run} for run in runs}
    assert counted == {
        "equal": {("2", "3 of 3")},
        "MGDA": {("2", "3 of 3")},
        "lost": {("2", "2 of 3")},
        "none": {("0", "0 of 3")},
    }
    assert [row["mean"] for row in rows if row["run"] == "alone" and row["metric"] == "error"] == ["5.0"]
    memory = Memory()
    report.log(memory)
    logged = memory.lines[0][1]
    assert [logged[f"transfer/seeds/{run}"] for run in ("lost", "none")] == [2, 0]
    assert "transfer/delta_m/none" not in logged


def test_baselines_that_diverged_leave_nothing_to_compare_with() -> None:
    lost = [{"a": {"accuracy": 0.5, "error": 1.0, "loss": float("nan")}, "b": {"loss": 1.0}}] * 3
    alone = SingleTaskBaselines((0, 1, 2), lost, DIRECTIONS)
    assert np.isnan(list(alone.means()["a"].values())).all()
    assert alone.means()["b"] == {"loss": 1}
    report = TransferReport(alone, RUNS)
    assert report.seeds == ()
    assert np.isnan(report.delta_m("equal")).all()
    assert "alone (0 of 3 seeds)" in report.markdown()
    assert "finished: none." in report.markdown()
    report.figure()


def test_one_seed_has_numbers_and_no_verdict() -> None:
    alone = SingleTaskBaselines((0,), ALONE.scores[:1], DIRECTIONS)
    report = TransferReport(alone, {"equal": RUNS["equal"][:1]})
    assert report.hurt("equal") == report.helped("equal") == []
    assert "One seed" in report.markdown()
    assert "**" not in report.markdown()
    assert "mean rank" not in report.markdown()  # of one run
    report.figure()


@pytest.mark.parametrize(
    ("runs", "arguments", "message"),
    [
        ({}, {}, "has nothing to compare"),
        ({"equal": RUNS["equal"][:2]}, {}, r"Run 'equal' has scores of 2 seeds, the baselines of 3: \(0, 1, 2\)"),
        ({"equal": [{"a": {"accuracy": 1.0}, "b": {}}] * 3}, {}, "no score for error of a, loss of b"),
        (RUNS, {"confidence": 95}, "confidence=95"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferReport(ALONE, runs, **arguments)


def test_a_picture_of_many_tasks_is_a_heatmap(report: TransferReport) -> None:
    axes: Any = report.figure().axes[0]
    marks = {container.get_label(): container[0].get_xdata() for container in axes.containers}
    assert list(marks) == list(RUNS)
    for run, drawn in marks.items():
        gains = [report.gain(run, task).mean for task in "ab"]
        np.testing.assert_allclose(np.asarray(drawn, dtype=float), [*gains, -report.delta_m(run).mean])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "all (-Δm)"]
    many = draw_intervals(
        {run: [report.gain(run, "a")] * 40 for run in RUNS}, [f"task {i}" for i in range(40)], title="gain"
    )
    assert many.axes[0].images
