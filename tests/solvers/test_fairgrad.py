"""The alpha-fair combination of the gradients."""

import numpy as np
import pytest
from scipy.optimize import minimize

from lightning_mtl.solvers import SolverError, alpha_fair_weights, barrier, is_stationary, min_norm_weights
from tests.solvers.families import J1, J2, Array, Case

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize(
    ("rows", "alpha", "expected"),
    [
        (J1, 0.5, [0.742828251749388, 0.5253926087030508]),
        (J1, 1.0, [0.5914611522293678, 0.4070714828838854]),
        (J1, 2.0, [0.4713629223235375, 0.31945422818549524]),
        (J2, 0.5, [0.35356730988404717, 0.5615903368386238, 0.5132656461324456]),
        (J2, 1.0, [0.1969703917176407, 0.4305756519192961, 0.3891758622858842]),
        (J2, 2.0, [0.09750249240581733, 0.336121875269354, 0.31007079919125025]),
    ],
)
def test_golden(rows: Array, alpha: float, expected: list[float]) -> None:
    weights, stationary = alpha_fair_weights(rows @ rows.T, alpha)
    np.testing.assert_allclose(weights, expected, rtol=1e-11)
    assert not stationary


def test_solution_or_stationary_point(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    norms = np.sqrt(gramian.diagonal())
    for alpha in (0.1, 0.5, 2.0, 10.0):
        weights, stationary = alpha_fair_weights(gramian, alpha)
        assert stationary == is_stationary(gramian)
        if stationary:
            np.testing.assert_array_equal(weights, min_norm_weights(gramian))
            continue
        # Gw = w^(-1/alpha), up to what rounding in Gw leaves. Far from alpha = 1 that is all for norms 1e16 apart: what
        # has to be met there is a tiny fraction of the terms that make it up.
        target = weights ** (-1 / alpha)
        rounding = 4 * len(norms) * EPS * norms * (norms @ weights)
        assert weights.min() > 0
        assert (np.abs(gramian @ weights - target) <= 1e-9 * target + rounding).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_norms_that_differ_by_1e8(alpha: float) -> None:
    rng = np.random.default_rng(0)
    for num_tasks in (2, 3, 8, 16):
        rows = rng.standard_normal((num_tasks, num_tasks + 3)) * np.geomspace(1e-4, 1e4, num_tasks)[:, None]
        weights = alpha_fair_weights(rows @ rows.T, alpha).weights
        np.testing.assert_allclose(rows @ (rows.T @ weights), weights ** (-1 / alpha), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_no_general_optimiser_finds_a_lower_value(independent_rows: Array, alpha: float) -> None:
    gramian = independent_rows @ independent_rows.T
    gramian /= gramian.trace()
    power = 1 - 1 / alpha

    def objective(log_weights: Array) -> float:
        weights = np.exp(log_weights)
        return float(weights @ gramian @ weights / 2 - (weights**power).sum() / power)

    weights = alpha_fair_weights(gramian, alpha).weights
    other = minimize(objective, np.zeros(len(gramian)), method="BFGS", options={"gtol": 1e-8})
    assert objective(np.log(weights)) <= other.fun + 1e-12
    np.testing.assert_allclose(weights, np.exp(other.x), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1e8, 1e60])
def test_scale_of_the_gramian(scale: float, alpha: float) -> None:
    gramian = J2 @ J2.T
    expected = alpha_fair_weights(gramian, alpha).weights * scale ** (-alpha / (alpha + 1))
    np.testing.assert_allclose(alpha_fair_weights(scale * gramian, alpha).weights, expected, rtol=1e-9)


def test_permutation_of_the_tasks_permutes_the_weights() -> None:
    rng = np.random.default_rng(0)
    for num_tasks in (2, 3, 8, 20):
        rows = rng.standard_normal((num_tasks, num_tasks + 3))
        order = rng.permutation(num_tasks)
        weights = alpha_fair_weights(rows @ rows.T, 2.0).weights
        np.testing.assert_allclose(
            alpha_fair_weights(rows[order] @ rows[order].T, 2.0).weights, weights[order], rtol=1e-9
        )


def test_one_task() -> None:
    np.testing.assert_allclose(alpha_fair_weights([[8.0]], 0.5).weights, [0.5], rtol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.inf, np.nan])
def test_a_wrong_alpha_is_refused_by_name_and_value(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be positive and finite, but is {alpha}"):
        alpha_fair_weights(J1 @ J1.T, alpha)


def test_too_few_iterations_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "MAX_ITERATIONS", 2)
    with pytest.raises(SolverError, match=r"alpha_fair_weights did not converge .* after 2 iterations"):
        alpha_fair_weights(J2 @ J2.T, 2.0)
