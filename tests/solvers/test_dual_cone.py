"""Projection on the dual cone of the gradients."""

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from lightning_mtl.solvers import SolverError, dual_cone, project_on_dual_cone, project_rows_on_dual_cone
from tests.solvers.families import J1, J2, Array, Case, weakly_stationary


def mean(num_tasks: int) -> Array:
    return np.full(num_tasks, 1 / num_tasks)


def assert_projection(rows: Array, preference: Array, weights: Array, tol: float = 1e-9) -> None:
    """The conditions of the projection: additions >= 0, no conflict, and additions only to rows at a right angle."""
    gramian = rows @ rows.T
    norms = np.sqrt(gramian.diagonal())
    size = (np.abs(preference) * norms).max()
    additions = (weights - preference) * norms
    products = gramian @ weights / np.where(norms == 0, 1.0, norms)
    assert (additions >= 0).all()
    assert (products >= -tol * size).all()
    assert (additions * products <= tol * size**2).all()


@pytest.mark.parametrize(
    ("rows", "expected"), [(J1, [0.6111111111111112, 0.5]), (J2, [0.3333333333333333] * 3)], ids=["J1", "J2"]
)
def test_golden_of_the_mean(rows: Array, expected: list[float]) -> None:
    np.testing.assert_allclose(project_on_dual_cone(rows @ rows.T, mean(len(rows))), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (J1, [1.1111111111111112, 0.7894736842105263]),
        (J2, [0.3333333333333333, 0.37142857142857144, 0.37262606417812705]),
    ],
    ids=["J1", "J2"],
)
def test_golden_of_the_rows(rows: Array, expected: list[float]) -> None:
    np.testing.assert_allclose(project_rows_on_dual_cone(rows @ rows.T, mean(len(rows))), expected, rtol=1e-13)


def test_projection_of_the_mean(case: Case) -> None:
    preference = mean(len(case.rows))
    weights = project_on_dual_cone(case.rows @ case.rows.T, preference)
    assert_projection(case.rows, preference, weights)


def test_projection_of_a_row(case: Case) -> None:
    preference = np.zeros(len(case.rows))
    preference[0] = 1.0
    gramian = case.rows @ case.rows.T
    weights = project_on_dual_cone(gramian, preference)
    assert_projection(case.rows, preference, weights)
    np.testing.assert_array_equal(weights, project_rows_on_dual_cone(gramian, preference))


def test_the_rows_projections_do_not_conflict(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    weights = project_rows_on_dual_cone(gramian, mean(len(gramian)))
    assert (gramian @ weights >= -1e-9 * gramian.trace()).all()


def test_rows_are_combined_by_their_preference() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 8))
    gramian = rows @ rows.T
    preference = np.array([0.5, 0.0, 2.0, 1.0, 0.1, 3.0])
    expected = sum(p * project_on_dual_cone(gramian, e) for p, e in zip(preference, np.eye(6), strict=True))
    np.testing.assert_allclose(project_rows_on_dual_cone(gramian, preference), expected, rtol=1e-12)


def test_two_tasks_in_conflict_are_each_projected_off_the_other() -> None:
    """PCGrad's rule, to which the projection of the rows comes down for two tasks."""
    cosine = J1[0] @ J1[1]
    expected = [1 - cosine / (J1[0] @ J1[0]), 1 - cosine / (J1[1] @ J1[1])]
    np.testing.assert_allclose(project_rows_on_dual_cone(J1 @ J1.T, [1.0, 1.0]), expected, rtol=1e-13)


def test_without_conflict_nothing_changes() -> None:
    rows = np.abs(np.random.default_rng(0).standard_normal((5, 7)))
    preference = np.array([1.0, 0.0, 2.0, 0.5, 1.0])
    np.testing.assert_array_equal(project_on_dual_cone(rows @ rows.T, preference), preference)
    np.testing.assert_array_equal(project_rows_on_dual_cone(rows @ rows.T, preference), preference)


def test_no_general_optimiser_finds_a_nearer_one(independent_rows: Array) -> None:
    rows = independent_rows / np.linalg.norm(independent_rows, axis=1).max()
    preference = mean(len(rows))
    target = preference @ rows
    weights = project_on_dual_cone(rows @ rows.T, preference)

    def objective(direction: Array) -> float:
        return float(((direction - target) ** 2).sum())

    other = minimize(
        objective, target, constraints=[LinearConstraint(rows, 0, np.inf)], method="SLSQP", options={"ftol": 1e-16}
    )
    np.testing.assert_allclose(weights @ rows, other.x, atol=1e-6)


def test_rows_are_projected_linearly_under_scaling() -> None:
    """Scaling the rows scales the parts of the direction: what UPGrad is made for."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4, 6))

    def direction(scales: Array) -> Array:
        scaled = scales[:, None] * rows
        result: Array = project_rows_on_dual_cone(scaled @ scaled.T, mean(4)) @ scaled
        return result

    one, other = rng.uniform(0.1, 10, 4), rng.uniform(1e3, 1e4, 4)
    np.testing.assert_allclose(direction(one + other), direction(one) + direction(other), rtol=1e-9)


def test_permutation_of_the_tasks_permutes_the_weights() -> None:
    rng = np.random.default_rng(2)
    for num_tasks in (2, 3, 8, 20):
        rows, preference = rng.standard_normal((num_tasks, num_tasks + 3)), rng.random(num_tasks)
        order = rng.permutation(num_tasks)
        gramian, permuted = rows @ rows.T, rows[order] @ rows[order].T
        for project in (project_on_dual_cone, project_rows_on_dual_cone):
            np.testing.assert_allclose(
                project(permuted, preference[order]), project(gramian, preference)[order], atol=1e-10
            )


@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1e8, 1e60])
def test_scale_of_the_gramian_does_not_matter(scale: float) -> None:
    gramian = J1 @ J1.T
    for project in (project_on_dual_cone, project_rows_on_dual_cone):
        np.testing.assert_allclose(project(scale * gramian, mean(2)), project(gramian, mean(2)), rtol=1e-12)


def test_a_gramian_in_float32_that_shows_it_by_a_negative_eigenvalue() -> None:
    """Taken for zero, that eigenvalue sends the weights to 1e6 and the direction into conflict."""
    seen = 0
    for seed in range(40):
        rows = weakly_stationary(np.random.default_rng(seed), 8).astype(np.float32)
        exact = rows.astype(np.float64)
        gramian = rows @ rows.T
        if np.linalg.eigvalsh(gramian.astype(np.float64))[0] > -1e-7:
            continue  # A positive one of that size cannot be told from a true one: multiply in float64.
        seen += 1
        for project in (project_on_dual_cone, project_rows_on_dual_cone):
            weights = project(gramian, mean(8))
            assert (exact @ (weights @ exact)).min() >= -1e-6 * (exact**2).sum()
    assert seen > 3


def test_zero_rows_are_left_alone() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [-2.0, 1.0], [0.0, 0.0]])
    weights = project_on_dual_cone(rows @ rows.T, mean(4))
    np.testing.assert_array_equal(weights[[0, 3]], [0.25, 0.25])
    np.testing.assert_array_equal(project_on_dual_cone(np.zeros((2, 2)), mean(2)), mean(2))


def test_one_task() -> None:
    np.testing.assert_array_equal(project_on_dual_cone([[3.0]], [2.0]), [2.0])
    np.testing.assert_array_equal(project_on_dual_cone([[4.0]], [-2.0]), [0.0])
    np.testing.assert_array_equal(project_rows_on_dual_cone([[3.0]], [2.0]), [2.0])


@pytest.mark.parametrize(
    ("preference", "message"),
    [([1.0], r"preference must have.*\(2,\).*\(1,\)"), ([1.0, np.inf], r"preference\[1\] is inf")],
)
def test_a_wrong_preference_is_refused_by_name_and_value(preference: list[float], message: str) -> None:
    for project in (project_on_dual_cone, project_rows_on_dual_cone):
        with pytest.raises(ValueError, match=message):
            project(J1 @ J1.T, preference)


def test_rows_cannot_be_preferred_negatively() -> None:
    with pytest.raises(ValueError, match=r"preference\[1\] is -1.0"):
        project_rows_on_dual_cone(J1 @ J1.T, [1.0, -1.0])


def test_an_active_set_that_does_not_end_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object, **__: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(dual_cone, "nnls", endless)
    with pytest.raises(SolverError, match="project_on_dual_cone did not converge on a Gramian of K=2"):
        project_on_dual_cone(J1 @ J1.T, mean(2))
