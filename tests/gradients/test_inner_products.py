"""Inner products and norms of rows, from one block or several, at any scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mtl.gradients.inner_products import MadeBlocks, gramian, known_norms, row_norms

CHUNK = 16_384


def exact(rows: list[Tensor]) -> Tensor:
    whole = torch.cat([block.double() for block in rows], dim=1)
    return whole @ whole.T


def assert_products(found: Tensor, rows: list[Tensor], tolerance: float) -> None:
    """Every product is exact to ``tolerance`` of the two norms that it is made of."""
    expected = exact(rows)
    norms = expected.diagonal().sqrt()
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    # Divided one after the other: the product of two norms may leave the range of float64.
    error = (found - expected).abs() / norms / norms[:, None]
    assert error.max() <= tolerance


@pytest.mark.parametrize("exponent", range(-25, 26, 5))
def test_gramian_at_any_scale(exponent: int) -> None:
    rows = [torch.randn(3, 50) * 10.0**exponent, torch.randn(3, 7) * 10.0**exponent]
    assert_products(gramian(rows), rows, 1e-6)


@pytest.mark.parametrize("spread", [5, 10, 15, 20, 25])
def test_gramian_of_rows_far_apart(spread: int) -> None:
    scales = torch.tensor([10.0**-spread, 1.0, 10.0**spread])[:, None]
    rows = [torch.randn(3, 50) * scales]
    assert_products(gramian(rows), rows, 1e-6)


@pytest.mark.parametrize("exponent", range(-25, 26, 5))
def test_norms_at_any_scale(exponent: int) -> None:
    rows = [torch.randn(3, 50) * 10.0**exponent, torch.randn(3, 7) * 10.0**exponent]
    torch.testing.assert_close(row_norms(rows).double(), exact(rows).diagonal().sqrt(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("width", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_gramian_in_chunks(width: int) -> None:
    rows = [torch.randn(2, width)]
    assert_products(gramian(rows), rows, 1e-6)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    num_rows=st.integers(1, 6),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_blocks_of_any_dtype(num_rows: int, widths: list[int], dtypes: list[torch.dtype], seed: int) -> None:
    torch.manual_seed(seed)
    rows = [torch.randn(num_rows, width).to(dtype) for width, dtype in zip(widths, dtypes, strict=False)]
    assert_products(gramian(rows), rows, 1e-6)
    norms = row_norms(rows)
    assert norms.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(norms.double(), exact(rows).diagonal().sqrt(), rtol=1e-5, atol=1e-12)


def test_zero_rows_have_zero_products() -> None:
    rows = [torch.zeros(2, 5)]
    assert gramian(rows).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert row_norms(rows).tolist() == [0.0, 0.0]


def test_autocast_does_not_shorten_the_products() -> None:
    rows = [torch.randn(3, 40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_products(gramian(rows), rows, 1e-6)


@pytest.mark.parametrize("measure", [known_norms, gramian])
def test_made_blocks_are_made_once(measure: Callable[[Sequence[Tensor]], object]) -> None:
    made: list[int] = []

    def make(number: int) -> Tensor:
        made.append(number)
        return torch.eye(2) + number

    measure(MadeBlocks([torch.eye(2)], [functools.partial(make, number) for number in range(3)]))
    assert made == [0, 1, 2]
