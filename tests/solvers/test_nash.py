"""The Nash bargaining solution among the gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mtl.solvers import SolverError, alpha_fair_weights, barrier, is_stationary, min_norm_weights
from tests.solvers.families import J1, J2, NEVER_STATIONARY, STATIONARY, Array, Case

EPS = np.finfo(np.float64).eps


def assert_solved(rows: Array, weights: Array, tol: float = 1e-9) -> None:
    """α * Gα = 1, up to what rounding in Gα leaves."""
    gramian = rows @ rows.T
    norms = np.sqrt(gramian.diagonal())
    rounding = 4 * len(rows) * EPS * norms * (norms @ weights) * weights
    assert weights.min() > 0
    assert (np.abs(weights * (gramian @ weights) - 1) <= tol + rounding).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (J1, [0.5914611522293678, 0.4070714828838854]),
        (J2, [0.1969703917176407, 0.4305756519192961, 0.3891758622858842]),
    ],
    ids=["J1", "J2"],
)
def test_golden(rows: Array, expected: list[float]) -> None:
    weights, stationary = alpha_fair_weights(rows @ rows.T)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert not stationary


def test_solution_or_stationary_point(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    weights, stationary = alpha_fair_weights(gramian)
    assert stationary == is_stationary(gramian)
    assert not (stationary and case.family in NEVER_STATIONARY)
    assert stationary or case.family not in STATIONARY
    if stationary:
        np.testing.assert_array_equal(weights, min_norm_weights(gramian))
    else:
        assert_solved(case.rows, weights)


def test_closed_form_of_two_tasks() -> None:
    rng = np.random.default_rng(0)
    for cosine in (*rng.uniform(-1, 1, 50), -1 + 1e-9, 0.0, 1.0):
        norms = 10.0 ** rng.uniform(-8, 8, 2)
        gramian = np.array([[1.0, cosine], [cosine, 1.0]]) * norms * norms[:, None]
        # Rounding in the Gramian itself moves 1 + cos by EPS.
        tolerance = 1e-10 + 4 * EPS / (1 + cosine)
        np.testing.assert_allclose(
            alpha_fair_weights(gramian).weights, 1 / (norms * np.sqrt(1 + cosine)), rtol=float(tolerance)
        )


def test_orthogonal_rows_are_normalized() -> None:
    norms = np.array([1e-12, 1e-3, 1.0, 1e9])
    np.testing.assert_allclose(alpha_fair_weights(np.diag(norms**2)).weights, 1 / norms, rtol=1e-14)


def test_the_combined_gradient_has_norm_root_k(independent_rows: Array) -> None:
    weights = alpha_fair_weights(independent_rows @ independent_rows.T).weights
    assert np.linalg.norm(weights @ independent_rows) == pytest.approx(np.sqrt(len(weights)), rel=1e-12)


def test_it_is_fairgrad_with_alpha_one(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    np.testing.assert_array_equal(alpha_fair_weights(gramian).weights, alpha_fair_weights(gramian, 1.0).weights)


def test_one_task() -> None:
    np.testing.assert_allclose(alpha_fair_weights([[4.0]]).weights, [0.5], rtol=1e-14)
    weights, stationary = alpha_fair_weights([[0.0]])
    np.testing.assert_array_equal(weights, [1.0])
    assert stationary


def test_permutation_of_the_tasks_permutes_the_weights() -> None:
    rng = np.random.default_rng(0)
    for num_tasks in (2, 3, 8, 20):
        rows = rng.standard_normal((num_tasks, num_tasks + 3))
        order = rng.permutation(num_tasks)
        np.testing.assert_allclose(
            alpha_fair_weights(rows[order] @ rows[order].T).weights,
            alpha_fair_weights(rows @ rows.T).weights[order],
            rtol=1e-9,
        )


@given(st.integers(0, 1000), st.lists(st.floats(-30, 30), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_scaling_a_row_divides_its_weight(seed: int, exponents: list[float]) -> None:
    num_tasks = len(exponents)
    rows = np.random.default_rng(seed).standard_normal((num_tasks, num_tasks + 3))
    scales: Array = 10.0 ** np.array(exponents)
    gramian = rows @ rows.T
    scaled = gramian * scales * scales[:, None]
    np.testing.assert_allclose(
        alpha_fair_weights(scaled).weights * scales, alpha_fair_weights(gramian).weights, rtol=1e-8
    )


def test_the_way_to_a_stationary_point_is_solved_until_it_is_one() -> None:
    for gap in np.geomspace(1e-1, 1e-16, 46):
        gramian = np.array([[1.0, gap - 1, 0.0], [gap - 1, 1.0, 0.0], [0.0, 0.0, 1.0]])
        weights, stationary = alpha_fair_weights(gramian)
        assert stationary == is_stationary(gramian)
        if not stationary:
            assert np.abs(weights * (gramian @ weights) - 1).max() <= 1e-9 + 10 * EPS / gap


def test_a_float32_gramian_of_a_stationary_point_that_is_indefinite() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.standard_normal((8, 3)).astype(np.float32)
        weights, stationary = alpha_fair_weights(rows @ rows.T)
        exact = rows.astype(np.float64)
        assert stationary or np.linalg.norm(weights @ exact) < 4  # The root of 8, with room for the error.


def test_too_few_iterations_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "MAX_ITERATIONS", 2)
    with pytest.raises(
        SolverError, match=r"alpha_fair_weights did not converge .* K=3 tasks: residual .* after 2 iterations"
    ):
        alpha_fair_weights(J2 @ J2.T)
