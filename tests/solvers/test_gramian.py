"""Checking, normalizing and factoring a Gramian."""

import numpy as np
import pytest
from numpy.typing import ArrayLike

from lightning_mtl.solvers import SolverError
from lightning_mtl.solvers.gramian import factor, normalize
from tests.solvers.families import Case


def test_cosines_and_norms_give_the_gramian_back(case: Case) -> None:
    gramian = case.rows @ case.rows.T
    cosines, norms = normalize(gramian)
    np.testing.assert_allclose(norms * cosines * norms[:, None], gramian, rtol=1e-14)
    assert ((cosines.diagonal() == 0) == (norms == 0)).all()


def test_factor_reproduces_the_cosines_with_full_rank(case: Case) -> None:
    cosines, _ = normalize(case.rows @ case.rows.T)
    root = factor(cosines)
    np.testing.assert_allclose(root.T @ root, cosines, atol=1e-12)
    assert np.linalg.matrix_rank(root, tol=1e-8) == len(cosines)


def test_factor_of_a_float32_gramian_with_a_negative_eigenvalue() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    cosines, _ = normalize(rows @ rows.T)
    assert np.linalg.eigvalsh(cosines)[0] < -1e-9
    root = factor(cosines)
    np.testing.assert_allclose(root.T @ root, cosines, atol=1e-6)


def test_off_diagonal_dirt_of_a_zero_row_is_removed() -> None:
    cosines, norms = normalize([[0.0, 1e-9], [1e-9, 4.0]])
    np.testing.assert_array_equal(cosines, [[0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(norms, [0.0, 2.0])


@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_norms_whose_product_leaves_float64_are_no_trouble(scale: float) -> None:
    cosines, _ = normalize(scale * np.array([[1.0, 0.5], [0.5, 1.0]]))
    np.testing.assert_allclose(cosines, [[1.0, 0.5], [0.5, 1.0]], rtol=1e-12)


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones((2, 3)), r"gramian must be a square matrix.*\(2, 3\)"),
        (np.ones(3), r"gramian must be a square matrix.*\(3,\)"),
        (np.ones((0, 0)), r"gramian must be a square matrix.*\(0, 0\)"),
        ([[1.0, np.nan], [np.nan, 1.0]], r"gramian\[0, 1\] is nan"),
        ([[1.0, 0.0], [0.0, np.inf]], r"gramian\[1, 1\] is inf"),
        ([[1.0, 0.0], [0.0, -2.0]], r"gramian\[1, 1\] is -2.0"),
    ],
)
def test_what_is_no_gramian_is_refused_by_name_and_value(gramian: ArrayLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(gramian)


def test_the_input_is_not_written_to() -> None:
    gramian = np.array([[0.0, 0.0], [0.0, 4.0]])
    gramian.flags.writeable = False
    normalize(gramian)


def test_solver_error_says_what_happened() -> None:
    error = SolverError("alpha_fair_weights", num_tasks=3, iterations=7, residual=0.25)
    assert str(error) == (
        "alpha_fair_weights did not converge on a Gramian of K=3 tasks: residual 0.25 after 7 iterations."
    )
    assert (error.num_tasks, error.iterations, error.residual) == (3, 7, 0.25)
