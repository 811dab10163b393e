"""The minimum-norm point of the convex hull of the gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from lightning_mtl.solvers import SolverError, gramian, min_norm_weights
from tests.solvers.families import J1, J2, Array, Case


def assert_optimal(rows: Array, weights: Array, tol: float = 1e-12) -> None:
    """G w >= wᵀGw, equal on the support: relative to the cosines, for this is how well Gw itself can be computed."""
    gramian = rows @ rows.T
    norms = np.sqrt(gramian.diagonal())
    assert weights.shape == norms.shape
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    slack = gramian @ weights - weights @ gramian @ weights
    allowed = tol * norms * (weights @ norms)
    assert (slack >= -allowed).all()
    # On the support the slack is multiplied by the weight: a weight of rounding size is none.
    assert (weights * slack <= weights.max() * allowed).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(J1, [0.6000000000000001, 0.4]), (J2, [0.0, 0.49306759098786823, 0.5069324090121318])],
)
def test_golden(rows: Array, expected: list[float]) -> None:
    np.testing.assert_allclose(min_norm_weights(rows @ rows.T), expected, rtol=1e-12, atol=1e-15)


def test_optimality(case: Case) -> None:
    assert_optimal(case.rows, min_norm_weights(case.rows @ case.rows.T))


def test_closed_form_of_two_tasks(independent_rows: Array) -> None:
    g1, g2 = independent_rows[:2]
    expected = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0, 1)
    weights = min_norm_weights(independent_rows[:2] @ independent_rows[:2].T)
    np.testing.assert_allclose(weights, [expected, 1 - expected], atol=1e-12)


def test_no_general_optimiser_finds_a_shorter_one(independent_rows: Array) -> None:
    gramian = independent_rows @ independent_rows.T
    gramian /= gramian.trace()
    num_tasks = len(gramian)
    weights = min_norm_weights(gramian)

    def objective(w: Array) -> float:
        return float(w @ gramian @ w)

    other = minimize(
        objective,
        np.full(num_tasks, 1 / num_tasks),
        bounds=[(0, 1)] * num_tasks,
        constraints=[LinearConstraint(np.ones(num_tasks), 1, 1)],
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert weights @ gramian @ weights <= other.fun + 1e-10
    np.testing.assert_allclose(weights, other.x, atol=1e-4)


def test_rows_that_differ_by_1e8_in_norm() -> None:
    # Rows at an obtuse angle: the point is between them, and the weight of the long one is about 1e-8.
    rows = np.array([[1e-4, 0.0], [-3e3, 4e3]])
    weights = min_norm_weights(rows @ rows.T)
    difference = rows[0] - rows[1]
    expected = rows[0] @ difference / (difference @ difference)
    assert weights[1] == pytest.approx(expected, rel=1e-12)


def test_the_shortest_row_of_an_acute_pair_takes_all() -> None:
    rows = np.array([[1e-8, 0.0], [1e8, 1e8]])
    np.testing.assert_array_equal(min_norm_weights(rows @ rows.T), [1.0, 0.0])


def test_one_task() -> None:
    np.testing.assert_array_equal(min_norm_weights([[7.0]]), [1.0])
    np.testing.assert_array_equal(min_norm_weights([[0.0]]), [1.0])


def test_zero_rows_share_the_weight() -> None:
    gramian = np.diag([1.0, 0.0, 4.0, 0.0])
    np.testing.assert_array_equal(min_norm_weights(gramian), [0.0, 0.5, 0.0, 0.5])


def test_opposite_rows_cancel() -> None:
    rows = np.array([[2.0, 0.0], [-6.0, 0.0]])
    np.testing.assert_allclose(min_norm_weights(rows @ rows.T), [0.75, 0.25], rtol=1e-14)


def test_permutation_of_the_tasks_permutes_the_weights() -> None:
    rng = np.random.default_rng(0)
    for num_tasks in (2, 3, 8, 20):
        rows = rng.standard_normal((num_tasks, num_tasks + 3))
        order = rng.permutation(num_tasks)
        np.testing.assert_allclose(
            min_norm_weights(rows[order] @ rows[order].T), min_norm_weights(rows @ rows.T)[order], atol=1e-12
        )


@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1e8, 1e60])
def test_scale_of_the_gramian_does_not_matter(scale: float) -> None:
    gramian = J2 @ J2.T
    np.testing.assert_allclose(min_norm_weights(scale * gramian), min_norm_weights(gramian), atol=1e-13)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_optimality_on_small_integers(rows: list[list[int]]) -> None:
    """Small integers make ties, duplicates, zero rows and exact stationarity common."""
    jacobian = np.array(rows, dtype=np.float64)
    assert_optimal(jacobian, min_norm_weights(jacobian @ jacobian.T))


def test_an_active_set_that_does_not_end_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object, **__: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(gramian, "nnls", endless)
    with pytest.raises(SolverError, match="min_norm_weights did not converge on a Gramian of K=2"):
        min_norm_weights(np.eye(2))
