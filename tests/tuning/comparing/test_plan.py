"""What a comparison trains next, as pure functions of what is known."""

from __future__ import annotations

import math

import pytest

from lightning_mtl.transfer.finished import TaskScores
from lightning_mtl.tuning.comparing.plan import Candidate, Line, Plan, Training, rates_around, regrets, search

LOSS = {"a": {"loss": False}}
LINE = Line("row", LOSS)
RATES = (0.01, 0.1, 1.0)


def told(line: Line, best: float, rates: tuple[float, ...] = RATES) -> tuple[list[float], dict[str, TaskScores]]:
    """Answer what a line's search asks, the loss being the distance in decades from a rate; return all of it."""
    known: dict[str, TaskScores] = {}
    while True:
        found = search(line, rates, 0, known)
        if found.choice is not None:
            return [training.candidate.rate for training in found.trainings], known
        for training in found.trainings:
            rate = training.candidate.rate
            known[training.key] = {"a": {"loss": 1 + abs(math.log10(rate / best)) + training.candidate.variant}}


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (0.1, [0.01, 0.1, 1.0], ""),
        (1.0, [0.01, 0.1, 1.0, 10.0], ""),
        (0.001, [0.01, 0.1, 1.0, 0.001, 0.0001], ""),
        (1e9, [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0], "highest"),
    ],
)
def test_a_choice_at_the_edge_widens_the_grid_three_times_at_most(best: float, tried: list[float], edge: str) -> None:
    asked, known = told(LINE, best)
    assert asked == pytest.approx(tried)
    choice = search(LINE, RATES, 0, known).choice
    assert choice is not None
    assert choice.edge == edge
    assert choice.candidate == Candidate(0, min(asked, key=lambda rate: abs(math.log10(rate / best))))
    assert choice.tried == tuple(sorted(asked))


def test_only_the_chosen_variant_is_widened_for() -> None:
    asked, _ = told(Line("fixed", LOSS, variants=2), 1.0)
    assert asked == pytest.approx([*RATES, *RATES, 10.0])


def test_regret_has_no_unit_and_knows_the_direction() -> None:
    low, high, lost = Candidate(0, 0.1), Candidate(0, 1.0), Candidate(0, 10.0)
    directions = {"a": {"loss": False}, "b": {"accuracy": True}}
    scores = {
        low: {"a": {"loss": 3e6}, "b": {"accuracy": 0.8}},
        high: {"a": {"loss": 2e6}, "b": {"accuracy": 0.6}},
        lost: {"a": {"loss": math.nan}, "b": {"accuracy": 0.9}},
    }
    found = regrets(scores, directions)
    assert found[low] == pytest.approx((0.5 + 0) / 2)
    assert found[high] == pytest.approx((0 + 0.2 / 0.8) / 2)
    assert found[lost] == math.inf  # nor does its accuracy count as the best
    assert regrets({low: {"a": {"loss": 0.0}}, high: {"a": {"loss": 4.0}}}, LOSS) == {low: 0.0, high: 1.0}


def test_where_all_diverge_the_lowest_rate_is_chosen_and_lower_ones_tried() -> None:
    known: dict[str, TaskScores] = {}
    for _ in range(5):
        found = search(LINE, RATES, 0, known)
        known |= {training.key: {"a": {"loss": math.nan}} for training in found.trainings}
    assert [one.candidate.rate for one in found.trainings] == pytest.approx([*RATES, 1e-3, 1e-4, 1e-5])
    assert found.choice is not None
    assert found.choice.edge == "lowest"


def test_a_line_whose_trainings_all_fail_has_no_choice() -> None:
    known: dict[str, TaskScores | None] = {training.key: None for training in search(LINE, RATES, 0, {}).trainings}
    choice = search(LINE, RATES, 0, known).choice
    assert choice is not None
    assert choice.candidate is None


def test_seeds_follow_the_choices_side_by_side_and_one_rate_needs_no_choice() -> None:
    lines = (Line("single", LOSS, task="a"), Line("equal weights", LOSS))
    plan = Plan(lines, (0.1,), 0, (1, 2), "equal weights")
    wanted = plan.trainings({})
    assert [(one.purpose, one.row, one.seed) for one in wanted] == [
        ("compare", "single", 1),
        ("compare", "equal weights", 1),
        ("compare", "single", 2),
        ("compare", "equal weights", 2),
        ("monitor", "equal weights", 1),
    ]
    assert len({one.key for one in wanted}) == len(wanted)
    assert plan.missing({wanted[0].key: None}) == wanted[1:]
    assert plan.expected({}) == 5


def test_what_is_expected_counts_the_seeds_of_choices_that_are_open() -> None:
    plan = Plan((LINE, Line("equal weights", LOSS)), RATES, 0, (1, 2), "equal weights")
    assert plan.trainings({}) == [
        Training("choose", line.row, None, Candidate(0, r), 0) for line in plan.lines for r in RATES
    ]
    assert plan.expected({}) == 6 + 4 + 1


def test_default_rates_lie_around_the_configurations() -> None:
    assert rates_around(1e-3) == pytest.approx((1e-3 / 10**0.5, 1e-3, 1e-3 * 10**0.5), rel=1e-3)
