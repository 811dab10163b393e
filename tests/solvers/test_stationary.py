"""The criterion for Pareto-stationary points."""

import numpy as np
import pytest

from lightning_mtl.solvers import is_stationary, min_norm_weights
from lightning_mtl.solvers.gramian import min_norm_solution
from tests.solvers.families import NEVER_STATIONARY, STATIONARY, Case


def test_families_that_are_stationary_by_construction(case: Case) -> None:
    if case.family in STATIONARY:
        assert is_stationary(case.rows @ case.rows.T)
    if case.family in NEVER_STATIONARY:
        assert not is_stationary(case.rows @ case.rows.T)


@pytest.mark.parametrize(("cosine", "expected"), [(-1 + 1e-12, True), (-1 + 3e-12, True), (-1 + 1e-11, False)])
def test_threshold_on_two_unit_rows(cosine: float, expected: bool) -> None:
    """Their shortest combination has the squared norm (1 + cosine) / 2, to be compared with 1e-12 times K."""
    assert is_stationary([[1.0, cosine], [cosine, 1.0]]) is expected


def test_a_short_gradient_is_no_stationary_point() -> None:
    assert not is_stationary(np.diag([1e-20, 1.0]))
    assert is_stationary(np.diag([0.0, 1.0]))


def test_one_task() -> None:
    assert not is_stationary([[1e-30]])
    assert is_stationary([[0.0]])


def test_the_stand_in_is_the_minimum_norm_point_and_says_so() -> None:
    gramian = np.array([[1.0, -2.0], [-2.0, 4.0]])
    solution = min_norm_solution(gramian)
    assert solution.stationary
    np.testing.assert_array_equal(solution.weights, min_norm_weights(gramian))
