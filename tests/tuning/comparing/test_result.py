"""The statistics of a comparison against scipy, its words, and its page."""

from __future__ import annotations

import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_mtl.tuning.comparing.advice import advice
from lightning_mtl.tuning.comparing.page import write_page
from lightning_mtl.tuning.comparing.result import Comparison, RowOutcome
from lightning_mtl.tuning.comparing.words import verdict

DIRECTIONS = {"a": {"loss": False}, "b": {"accuracy": True}}
SEEDS = (1, 2, 3, 4, 5)
generator = np.random.default_rng(0)
LOSSES, ACCURACIES = generator.uniform(1, 2, (4, 5)), generator.uniform(0.5, 0.9, (4, 5))
LOSSES[2] = 0.5 * LOSSES[1] * (1 + 0.01 * LOSSES[0])
ACCURACIES[2] = ACCURACIES[1]
NAMES = ("single task", "equal weights", "ahead", "noise")


def comparison(**more: object) -> Comparison:
    rows = tuple(
        RowOutcome(
            name,
            {s: {"a": {"loss": float(losses[i])}, "b": {"accuracy": float(own[i])}} for i, s in enumerate(SEEDS)},
            (0.01,),
            step_seconds=dict.fromkeys(SEEDS, 0.1 * (1 + place)),
        )
        for place, (name, losses, own) in enumerate(zip(NAMES, LOSSES, ACCURACIES, strict=True))
    )
    return Comparison(rows, DIRECTIONS, ("a", "b"), SEEDS, "test", **more)  # type: ignore[arg-type]


def changes(row: int, base: int = 1) -> np.ndarray:
    loss = (LOSSES[row] - LOSSES[base]) / LOSSES[base]
    return np.asarray(100 * (loss - (ACCURACIES[row] - ACCURACIES[base]) / ACCURACIES[base]) / 2)


def test_differences_are_those_of_scipys_paired_t_test() -> None:
    result = comparison()
    tests = {NAMES[row]: stats.ttest_1samp(changes(row), 0) for row in (0, 2, 3)}
    for row, name in ((0, "single task"), (2, "ahead"), (3, "noise")):
        found = result.against_equal[name]
        low, high = tests[name].confidence_interval(0.95)
        assert found.interval == pytest.approx((changes(row).mean(), low, high))
        assert found.p == pytest.approx(tests[name].pvalue)
        assert result.against_single.get(name) is None or found.p_corrected >= found.p
    smallest = min(tests.values(), key=lambda test: test.pvalue)
    assert result.against_equal["ahead"].p_corrected == pytest.approx(3 * smallest.pvalue)
    assert result.against_single["noise"].interval.mean == pytest.approx(changes(3, 0).mean())


def test_ranks_are_scipys_and_times_are_ratios() -> None:
    result = comparison()
    ranks = (stats.rankdata(LOSSES, axis=0) + stats.rankdata(-ACCURACIES, axis=0)).mean(axis=1) / 2
    assert list(result.ranks.values()) == pytest.approx(list(ranks))
    assert result.time_ratio("ahead") == pytest.approx(1.5)


def test_a_seed_that_diverged_leaves_the_pairs_ranks_last_and_is_told() -> None:
    rows = list(comparison().rows)
    lost = {**rows[3].scores, 2: {"a": {"loss": math.nan}, "b": {"accuracy": 0.99}}}
    rows[3] = RowOutcome("noise", lost, (0.01,))
    result = Comparison(tuple(rows), DIRECTIONS, ("a", "b"), SEEDS, "test")
    kept = np.delete(changes(3), 1)
    assert result.against_equal["noise"].interval.mean == pytest.approx(kept.mean())
    assert result.against_equal["noise"].p == pytest.approx(stats.ttest_1samp(kept, 0).pvalue)
    assert "noise (4 of 5 seeds)" in result.markdown()
    assert any("noise diverged with 1 of 5 seeds" in line for line in verdict(result))
    best_there = np.array([LOSSES[0, 1], LOSSES[1, 1], LOSSES[2, 1]]).argmin()
    assert best_there == 2  # so the lost accuracy of 0.99 gains no rank
    assert result.ranks["noise"] > comparison().ranks["noise"] - 1e-9


def test_only_main_tasks_count_where_roles_are_given() -> None:
    result = Comparison(comparison().rows, DIRECTIONS, ("a",), SEEDS, "test")
    expected = 100 * ((LOSSES[3] - LOSSES[1]) / LOSSES[1]).mean()
    assert result.against_equal["noise"].interval.mean == pytest.approx(expected)
    assert "Only the main tasks count: a." in result.markdown()


def test_a_metric_that_is_0_for_equal_weights_is_left_out() -> None:
    zero = {s: {"a": {"loss": 2.0}, "b": {"accuracy": 0.0}} for s in SEEDS}
    half = {s: {"a": {"loss": 1.0}, "b": {"accuracy": 0.5}} for s in SEEDS}
    rows = (RowOutcome("equal weights", zero), RowOutcome("other", half))
    result = Comparison(rows, DIRECTIONS, ("a", "b"), SEEDS, "test")
    assert result.against_equal["other"].interval.mean == pytest.approx(-50)
    assert math.isnan(result.task_change("other", "b").mean)
    assert "Left out of Δm against equal weights, 0 there: accuracy of b." in result.markdown()
    assert "Left out" not in comparison().markdown()


def test_words_name_what_differs_and_the_figures_that_advice_rests_on() -> None:
    result = comparison(figures={"norms": {"a": 30.0, "b": 0.1}, "conflict": 0.45, "measured": 40})
    said = verdict(result)
    assert said[0].endswith("1 better, 0 worse, 2 not told apart.")
    assert said[1].startswith("Better than equal weights: ahead (Δm -24")
    assert any(line == "Not told apart from equal weights: single task, noise." for line in said)
    tips = advice(result)
    assert tips[0].startswith("Take ahead")
    assert any("gradient of a is 300 times as long as that of b" in line and "standardize" in line for line in tips)
    assert any("conflict in 45 %" in line and "PCGrad" in line for line in tips)


@pytest.mark.parametrize(
    ("affinity", "said"),
    [
        (
            [[1.0, 0.4, -0.3], [0.2, 1.0, -0.2], [-0.5, -0.1, 1.0]],
            "By affinity some tasks hold others back: a step for c raises the loss of a by 50 % of what",
        ),
        (
            [[1.0, 0.4, 0.3], [0.2, 1.0, 0.2], [0.5, 0.1, 1.0]],
            "Affinity is no reason to train tasks apart: the least is that a step for c lowers the loss of b by 10 %",
        ),
        ([[1.0, -0.04, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], "Affinity is no reason to train tasks apart: the"),
    ],
)
def test_affinity_names_the_tasks_that_hold_others_back(affinity: list[list[float]], said: str) -> None:
    norms = {"a": 3.0, "b": 1.0, "c": 2.0}
    figures = {"norms": norms, "conflict": 0.2, "measured": 40, "tasks": list(norms), "affinity": affinity}
    (line,) = [line for line in advice(comparison(figures=figures)) if line.startswith(said)]
    assert ("Those that help each other: a, b; c." in line) == said.startswith("By")
    far_apart = {**figures, "norms": {**norms, "a": 300.0}}  # each step for a would swamp the others
    assert not any("ffinity" in line for line in advice(comparison(figures=far_apart)))


def test_rows_that_are_not_told_apart_from_the_best_are_named_with_the_cheapest_of_them() -> None:
    def row(name: str, seconds: float, *losses: float) -> RowOutcome:
        scores = {seed: {"a": {"loss": loss}} for seed, loss in enumerate(losses, 1)}
        return RowOutcome(name, scores, step_seconds=dict.fromkeys(scores, seconds))

    rows = (
        row("equal weights", 1.0, 10.0, 10.0, 10.0, 10.0),
        row("best", 4.0, 1.0, 1.2, 0.8, 1.0),
        row("cheap", 1.5, 1.1, 1.0, 1.1, 1.0),
        row("behind", 1.2, 5.0, 5.1, 4.9, 5.0),
    )
    result = Comparison(rows, {"a": {"loss": False}}, ("a",), (1, 2, 3, 4), "val")
    differences = [own[1] - own[0] for own in ([1.0, 1.1], [1.2, 1.0], [0.8, 1.1], [1.0, 1.0])]
    assert stats.ttest_1samp(differences, 0).pvalue > 0.05
    assert advice(result)[0].startswith("Take best: it is the furthest ahead of equal weights (Δm -90.0 %")
    assert advice(result)[1] == (
        "Not told apart from best: cheap. A step of cheap is the cheapest of these, 1.50 times that with equal weights."
    )


def test_more_seeds_are_advised_where_only_the_correction_stands_between() -> None:
    def row(name: str, *losses: float) -> RowOutcome:
        return RowOutcome(name, {seed: {"a": {"loss": loss}} for seed, loss in enumerate(losses, 1)})

    rows = (row("equal weights", 1.0, 1.0, 1.0), row("nearly", 0.92, 0.94, 0.96), row("far", 0.9, 1.0, 1.1))
    result = Comparison(rows, {"a": {"loss": False}}, ("a",), (1, 2, 3), "val")
    assert result.against_equal["nearly"].p < 0.05 < result.against_equal["nearly"].p_corrected
    assert advice(result)[0].startswith("Take more seeds (--seeds) before you choose: nearly would be ahead")
    settled = Comparison((rows[0], rows[2]), {"a": {"loss": False}}, ("a",), (1, 2, 3), "val")
    assert advice(settled)[0].startswith("Keep equal weights")
    assert "takes more than 100 seeds" in advice(settled)[-1]  # ±25 points with 3


class Numbers(HTMLParser):
    """Collects the values of <data> elements, the links, and the texts of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.values += [float(held["value"] or "")] if tag == "data" else []
        self.links += [held[name] or "" for name in ("src", "srcset", "href") if name in held]


def test_the_page_holds_everything_and_its_numbers_are_the_files(tmp_path: Path) -> None:
    result = comparison()
    page, parsed = write_page(result, about="a <b> & c"), Numbers()
    parsed.feed(page)
    assert len(parsed.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not re.search(r"https?://|@import|<script|<link", page)
    assert "a &lt;b&gt; &amp; c" in page
    result.to_csv(tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] != "seed_score"]
    written = {float(row[key]) for row in rows for key in ("mean", "low", "high", "p", "p_corrected") if row[key]}
    assert set(parsed.values) <= written
    wanted = {"delta_m_to_equal", "delta_m_to_single", "task_change", "mean_rank", "time_ratio", "score"}
    means = {float(row["mean"]) for row in rows if row["quantity"] in wanted}
    assert means <= set(parsed.values)
    assert all(line.partition("(")[0].strip() in page for line in verdict(result)[1:2])


def test_the_rates_of_single_tasks_have_their_tasks_and_the_star_is_at_the_one_at_the_edge() -> None:
    first, *rest = comparison().rows
    for rates, at_edge, expected in (
        ((0.3, 0.03), (True, False), ("a 0.3*", "b 0.03")),
        ((0.3, 0.3), (False, False), ("0.3",)),
        ((0.3, 0.3), (False, True), ("a 0.3", "b 0.3*")),
    ):
        rows = (RowOutcome(first.name, first.scores, rates, at_edge=at_edge), *rest)
        result = Comparison(rows, DIRECTIONS, ("a", "b"), SEEDS, "test")
        assert f" {', '.join(expected)} |" in result.markdown()
        assert f"<td>{'<br>'.join(expected)}</td>" in write_page(result)


def test_one_seed_is_no_seeds() -> None:
    result = Comparison(comparison().rows, DIRECTIONS, ("a", "b"), (1,), "test")
    assert result.shown().title.endswith("1 seed")
    assert "1 seed ·" in write_page(result)


def two_seeds(single: tuple[float, float], *others: tuple[float, float]) -> Comparison:
    """Losses of two seeds, beside equal weights whose losses are 1."""
    losses = {"equal weights": (1.0, 1.0), "single task": single}
    losses |= {f"other {number}": own for number, own in enumerate(others)}
    rows = [RowOutcome(name, {s: {"a": {"loss": own[s]}} for s in (0, 1)}) for name, own in losses.items()]
    return Comparison(tuple(rows), {"a": {"loss": False}}, ("a",), (0, 1), "test")


def test_equal_weights_and_single_tasks_have_one_verdict() -> None:
    # t is 12.72 for single tasks against equal weights, 11.8 the other way round, and 12.71 is the 5 % level.
    result = two_seeds((0.93 - 0.07 / 12.72, 0.93 + 0.07 / 12.72))
    ratios = [1 / own["a"]["loss"] - 1 for own in result.chosen["single task"].values()]
    assert stats.ttest_1samp(ratios, 0).pvalue > 0.05 > result.against_equal["single task"].p
    said = " ".join(verdict(result))
    assert "Better than equal weights: single task (Δm -7.0 %" in said
    assert re.search(r"against each task alone: worse \(Δm \+7\.5 % \[.*\], p < 0\.050\)", said)


def test_an_interval_beyond_0_that_the_correction_makes_no_finding_is_explained() -> None:
    result = two_seeds((0.93 - 0.07 / 20, 0.93 + 0.07 / 20), (0.9, 1.2))
    assert result.against_single["equal weights"].interval.low > 0
    said = next(line for line in verdict(result) if line.startswith("Learning together"))
    assert "not told apart (Δm +7.5 % [" in said
    assert "the interval is of this comparison alone, p is corrected for all" in said
    assert "this comparison alone" not in " ".join(verdict(two_seeds((0.8, 1.1), (0.9, 1.2))))


def losses(name: str, *values: float, failed: str = "") -> RowOutcome:
    return RowOutcome(name, {seed: {"a": {"loss": value}} for seed, value in enumerate(values, 1)}, failed=failed)


def of(*rows: RowOutcome) -> Comparison:
    return Comparison(rows, {"a": {"loss": False}}, ("a",), tuple(rows[0].scores), "val")


def test_single_tasks_without_standardized_targets_say_nothing_of_learning_together() -> None:
    rows = losses("equal weights", 9.0, 9.1, 9.2), losses("single task", 5.0, 5.1, 5.0)
    told = advice(of(*rows, losses("standardized targets", 1.0, 1.1, 1.0)))
    assert any(line.startswith("The single tasks were trained without what standardized targets has") for line in told)
    told = advice(of(*rows, losses("MGDA", 1.0, 1.1, 1.0)))
    assert any(line.startswith("Learning together helps: MGDA is ahead") for line in told)


def test_a_finding_is_no_reason_for_more_seeds() -> None:
    told = advice(of(losses("equal weights", 9.0, 9.1, 9.2), losses("single task", 5.0, 5.1, 5.0)))
    assert told[0].startswith("Even equal weights is behind each task trained alone")
    assert not any("Take more seeds" in line for line in told)


def test_one_seed_advises_nothing_but_more() -> None:
    told = advice(of(losses("equal weights", 9.0), losses("MGDA", 1.0)))
    assert told == ["Take five seeds or more (--seeds): a single one tells nothing apart."]


def test_rows_that_all_failed_are_named_and_nothing_is_advised() -> None:
    result = of(losses("equal weights", 9.0, 9.1), losses("PIVRG", failed="PIVRG needs validation"))
    assert verdict(result) == [
        "There is no row to compare with equal weights yet.",
        "PIVRG failed: PIVRG needs validation",
    ]
    assert not advice(result)


def test_what_was_below_the_level_only_before_the_correction_has_its_sign() -> None:
    rows = [losses("equal weights", 9.0, 9.1, 9.2), losses("worse", 9.9, 10.5, 10.4)]
    rows += [losses(f"like {i}", 9.0 + 0.1 * i, 9.0, 9.3) for i in range(9)]
    (line,) = [line for line in verdict(of(*rows)) if line.startswith("Below 5 % only before the correction")]
    assert "worse (Δm +12.8 %" in line


def test_a_task_without_labels_is_asked_about() -> None:
    scores = {seed: {"a": {"loss": 1.0}, "b": {"loss": math.nan}} for seed in (1, 2)}
    rows = RowOutcome("equal weights", scores), RowOutcome("MGDA", scores)
    result = Comparison(rows, {"a": {"loss": False}, "b": {"loss": False}}, ("a", "b"), (1, 2), "val")
    assert verdict(result) == ["No training has a score of b: do the validation data hold labels of it?"]
    assert not advice(result)
