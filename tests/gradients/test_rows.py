"""The matrix of rows: what is written, added, scaled, combined and used again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.gradients.rows import Rows


def parameters() -> list[Tensor]:
    return [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64), torch.zeros(1)]


def random_rows(like: list[Tensor], num_rows: int) -> list[list[Tensor]]:
    return [[torch.randn_like(p) for p in like] for _ in range(num_rows)]


def flat(row: list[Tensor]) -> Tensor:
    return torch.cat([piece.double().flatten() for piece in row])


def test_combination_and_measurements_of_two_dtypes() -> None:
    like, weights = parameters(), torch.tensor([0.5, -2.0, 3.0])
    written, rows = random_rows(like, 3), Rows(like, 3)
    for position, row in enumerate(written):
        rows.add(position, row)
    whole = torch.stack([flat(row) for row in written])
    torch.testing.assert_close(rows.gramian(), whole @ whole.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.norms().double(), whole.norm(dim=1), rtol=1e-6, atol=1e-6)
    for i, piece in enumerate(rows.combine(weights)):
        expected = sum((w * row[i] for w, row in zip(weights, written, strict=True)), torch.zeros_like(like[i]))
        assert piece is not None
        assert piece.dtype == like[i].dtype
        torch.testing.assert_close(piece, expected)
    assert rows.used == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    """Two weights whose difference half precision does not see."""
    rows, weights = Rows([torch.zeros(5, dtype=dtype)], 2), torch.tensor([1 / 3, 1e-4 - 1 / 3])
    for row in range(2):
        rows.add(row, [torch.ones(5, dtype=dtype)])
    [direction] = rows.combine(weights)
    assert direction is not None
    assert direction.dtype == dtype
    torch.testing.assert_close(direction.float(), weights.sum().expand(5), rtol=2e-2, atol=0)


def test_a_parameter_that_no_task_uses_has_no_direction() -> None:
    like = parameters()
    rows = Rows(like, 2)
    rows.add(0, [torch.ones(2, 3), None, None])
    rows.add(1, [None, None, torch.ones(1)])
    pieces = rows.combine(torch.tensor([2.0, 3.0]))
    assert rows.used == [0, 2]
    assert pieces[1] is None
    assert pieces[0] is not None
    assert pieces[2] is not None
    assert pieces[0].tolist() == [[2.0] * 3] * 2
    assert pieces[2].tolist() == [3.0]


def test_adding_scaling_and_beginning_anew() -> None:
    like = parameters()[:1]
    rows = Rows(like, 2)
    rows.add(0, [torch.full((2, 3), 4.0)])
    rows.add(0, [torch.full((2, 3), 2.0)])
    rows.scale(0, 0.5)
    assert rows.matrices()[0].tolist() == [[3.0] * 6]
    rows.begin()
    rows.add(0, [torch.ones(2, 3)])
    assert rows.matrices()[0].tolist() == [[1.0] * 6]


def test_a_matrix_fits_the_same_parameters_only() -> None:
    like = parameters()
    rows = Rows(like, 2)
    assert rows.fits(like, 2)
    assert not rows.fits(like, 3)
    assert not rows.fits(like[:2], 2)
    assert not rows.fits([like[1], like[0], like[2]], 2)
    assert not rows.fits(parameters(), 2)
    like[0].data = like[0].data.double()
    assert not rows.fits(like, 2)
