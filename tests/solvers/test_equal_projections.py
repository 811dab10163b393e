"""The direction with the same projection on every unit gradient."""

import numpy as np
import pytest

from lightning_mtl.solvers import equal_projection_weights
from tests.solvers.families import J1, J2, Array, Case


@pytest.mark.parametrize("rows", [J1, J2], ids=["J1", "J2"])
def test_projections_are_1(rows: Array) -> None:
    weights = equal_projection_weights(rows @ rows.T)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(units @ (weights @ rows), 1.0, rtol=1e-12)


def test_least_squares_on_every_family(case: Case) -> None:
    norms = np.linalg.norm(case.rows, axis=1)
    units = case.rows / np.where(norms == 0, 1.0, norms)[:, None]
    weights = equal_projection_weights(case.rows @ case.rows.T)
    assert np.isfinite(weights).all()
    assert (weights[norms == 0] == 0).all()
    direction = (weights * norms) @ units
    residual = 1.0 - units @ direction
    # At the least-squares solution the residual is orthogonal to the rows' span, up to what the cutoff leaves out.
    assert np.abs(units.T @ residual).max() <= 1e-3 * np.sqrt(len(norms))
    if case.family in ("independent", "norms_far_apart", "tiny", "huge"):
        np.testing.assert_allclose(residual, 0.0, atol=1e-7)


def test_parallel_rows_share() -> None:
    rows = np.outer([1.0, 2.0, 4.0], [3.0, 4.0])
    np.testing.assert_allclose(equal_projection_weights(rows @ rows.T), 1 / 3 / np.array([5.0, 10.0, 20.0]))


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 3.0), (1e-5, 7.0)])
def test_opposite_rows_have_no_such_direction(lengths: tuple[float, float]) -> None:
    rows = np.array([[lengths[0], 0.0], [-lengths[1], 0.0]])
    assert equal_projection_weights(rows @ rows.T).tolist() == [0.0, 0.0]


def test_scaling_a_row_divides_its_weight() -> None:
    scales = np.array([1e-8, 1.0, 1e8])
    scaled = scales[:, None] * J2
    np.testing.assert_allclose(
        equal_projection_weights(scaled @ scaled.T) * scales, equal_projection_weights(J2 @ J2.T), rtol=1e-9
    )


def test_one_row() -> None:
    np.testing.assert_allclose(equal_projection_weights([[4.0]]), [0.5])
    np.testing.assert_array_equal(equal_projection_weights([[0.0]]), [0.0])
