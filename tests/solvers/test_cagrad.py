"""The conflict-averse combination of the gradients."""

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

from lightning_mtl.solvers import SolverError, min_norm_weights, project_on_dual_cone
from lightning_mtl.weighting import cagrad
from lightning_mtl.weighting.cagrad import solve_cagrad
from tests.solvers.families import J1, J2, Array, Case


def dual(rows: Array, c: float, w: Array) -> float:
    """An upper bound, for any w in the simplex, on how much the worst task can improve within the ball."""
    center = rows.mean(axis=0)
    combined = w @ rows
    return float(combined @ center + c * np.linalg.norm(center) * np.linalg.norm(combined))


@pytest.mark.parametrize(
    ("rows", "c", "expected"),
    [
        (J1, 0.4, [0.6632993161855452, 0.5]),
        (J1, 0.5, [0.7041241452319316, 0.5]),
        (J1, 1.0, [1.2, 0.7999999999999999]),
        (J1, 2.0, [2.007124727947029, 1.3380831519646859]),
        (J2, 0.4, [0.3333333333333333, 0.6516328013240886, 0.5059259322341978]),
        (J2, 0.5, [0.3333333333333333, 0.7187109453411793, 0.574890280652472]),
        (J2, 1.0, [0.3333333333333333, 1.0449228628690235, 0.9102751167751237]),
        (J2, 2.0, [0.3333333333333333, 1.6886585749124936, 1.572112360264456]),
    ],
)
def test_golden(rows: Array, c: float, expected: list[float]) -> None:
    np.testing.assert_allclose(solve_cagrad(rows @ rows.T, c), expected, rtol=1e-11)


def test_in_the_ball_and_at_the_bound(case: Case) -> None:
    rows = case.rows / np.abs(case.rows).max()
    num_tasks = len(rows)
    shortest = min_norm_weights(rows @ rows.T)
    center = rows.mean(axis=0)
    size = np.linalg.norm(center)
    norms = np.linalg.norm(rows, axis=1)
    rounding = 1e-14 * norms.sum()
    for c in (0.1, 0.5, 1.0, 2.0):
        weights = solve_cagrad(case.rows @ case.rows.T, c)
        direction = weights @ rows
        assert (weights >= 1 / num_tasks).all()
        assert np.linalg.norm(direction - center) <= c * size * (1 + 1e-8) + rounding
        # No w can give a bound below the best direction's worst task: the one found has to prove that ours is best.
        # Where it vanishes, the minimum-norm point proves it.
        w = weights - 1 / num_tasks
        candidates = [shortest, w / w.sum()] if w.sum() > 0 else [shortest]
        bound = min(dual(rows, c, candidate) for candidate in candidates)
        assert (rows @ direction >= bound - norms * (1e-8 * (1 + c) * size + rounding)).all()


def test_no_conflict_from_c_equal_to_one(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    for c in (1.0, 1.5, 10.0):
        assert (gramian @ solve_cagrad(gramian, c) >= -1e-9 * gramian.trace()).all()


def test_fine_grid_of_two_tasks() -> None:
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 1001)
    for _ in range(20):
        rows, c = rng.standard_normal((2, 3)), rng.uniform(0.1, 2)
        direction = solve_cagrad(rows @ rows.T, c) @ rows
        lowest = min(dual(rows, c, np.array([w, 1 - w])) for w in grid)
        assert (rows @ direction).min() == pytest.approx(lowest, abs=1e-3)
        assert (rows @ direction).min() <= lowest + 1e-12


@pytest.mark.parametrize("c", [0.4, 1.5])
def test_no_general_optimiser_finds_a_better_direction(independent_rows: Array, c: float) -> None:
    rows = independent_rows / np.linalg.norm(independent_rows, axis=1).max()
    center = rows.mean(axis=0)
    direction = solve_cagrad(rows @ rows.T, c) @ rows

    # Variables: the direction, and the improvement of the worst task.
    def objective(x: Array) -> float:
        return -float(x[-1])

    def distance(x: Array) -> Array:
        offset = x[:-1] - center
        return np.array([offset @ offset])

    other = minimize(
        objective,
        np.append(center, (rows @ center).min()),
        constraints=[
            LinearConstraint(np.column_stack([rows, -np.ones(len(rows))]), 0, np.inf),
            NonlinearConstraint(distance, 0, float(c**2 * (center @ center))),
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert (rows @ direction).min() >= other.x[-1] - 1e-7
    np.testing.assert_allclose(direction, other.x[:-1], atol=1e-3)


def test_a_ball_without_extent_leaves_the_mean() -> None:
    np.testing.assert_array_equal(solve_cagrad(J2 @ J2.T, 0.0), np.full(3, 1 / 3))
    np.testing.assert_array_equal(solve_cagrad(np.zeros((2, 2)), 0.5), [0.5, 0.5])
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_array_equal(solve_cagrad(opposite, 0.5), [0.5, 0.5])


def test_where_the_combined_gradient_vanishes_the_mean_is_projected() -> None:
    rows = np.array([[3.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights = solve_cagrad(rows @ rows.T, 2.0)
    np.testing.assert_allclose(weights @ rows, [0.0, 1 / 3], atol=1e-14)
    np.testing.assert_array_equal(weights, project_on_dual_cone(rows @ rows.T, np.full(3, 1 / 3)))


def test_a_ball_that_ends_before_the_dual_cone_is_used_whole() -> None:
    rows = np.array([[3.0], [-1.0]])
    # The mean is 1: the short gradient is against it, and the direction goes as far its way as c allows.
    np.testing.assert_allclose(solve_cagrad(rows @ rows.T, 0.5) @ rows, [0.5], rtol=1e-12)


def test_zero_rows_take_no_part() -> None:
    """A task that does not care cannot get worse: the best for the worst is any direction without conflict."""
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [-0.5, 1.0]])
    direction = solve_cagrad(rows @ rows.T, 0.5) @ rows
    np.testing.assert_allclose(direction, rows.mean(axis=0), rtol=1e-12)


def test_one_task() -> None:
    np.testing.assert_allclose(solve_cagrad([[4.0]], 0.5), [1.5], rtol=1e-14)


def test_permutation_of_the_tasks_permutes_the_weights() -> None:
    rng = np.random.default_rng(0)
    for num_tasks in (2, 3, 8, 20):
        rows = rng.standard_normal((num_tasks, num_tasks + 3))
        order = rng.permutation(num_tasks)
        weights = solve_cagrad(rows @ rows.T, 0.7)
        np.testing.assert_allclose(solve_cagrad(rows[order] @ rows[order].T, 0.7), weights[order], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1e8, 1e60])
def test_scale_of_the_gramian_does_not_matter(scale: float) -> None:
    gramian = J2 @ J2.T
    np.testing.assert_allclose(solve_cagrad(scale * gramian, 0.5), solve_cagrad(gramian, 0.5), rtol=1e-10)


def test_too_few_iterations_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cagrad, "MAX_ITERATIONS", 1)
    with pytest.raises(SolverError, match=r"solve_cagrad did not converge .* K=3 tasks: residual .* after 1 iter"):
        solve_cagrad(J2 @ J2.T, 0.5)
