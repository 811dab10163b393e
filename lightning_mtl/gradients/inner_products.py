"""Inner products and norms of the tasks' gradients are what most methods read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks

Wanted = Literal["nothing", "norms", "gramian", "rows"]

# Measured on one core: a chunk of this width stays in cache, and short sums keep float32 products accurate.
_CHUNK = 16_384
# Rows in half precision are widened this many columns at a time, so that no second full copy ever exists.
_SPAN = 64 * _CHUNK
# Squares of float32 numbers lose their last digits below this.
_SMALLEST_SQUARE = 1e-30
# Float32's rounding moves the eigenvalues of unit rows by some 1e-7; below this, that would be felt.
_NEARLY_DEPENDENT = 1e-3


@dataclass
class Measured:
    """What was measured of the tasks' gradients, over all ranks.

    Attributes:
        gramian: ``[K, K]``, float64, on the CPU.
        norms: ``[K]``.
        rows: ``[K, n]`` matrices whose columns together make up the gradients.
    """

    gramian: Tensor | None = None
    norms: Tensor | None = None
    rows: Sequence[Tensor] = ()

    @classmethod
    def of_products(cls, products: Tensor, scale: Tensor | None, *, norms_only: bool = False) -> Measured:
        """A Gramian and the norms on its diagonal, a scaler's factor taken off."""
        if scale is not None:
            products = products / scale.detach().cpu().double().square()
        norms = products.diagonal().sqrt()
        return cls(norms=norms) if norms_only else cls(gramian=products, norms=norms)

    @classmethod
    def of_norms(cls, norms: Tensor, scale: Tensor | None, rows: Sequence[Tensor] = ()) -> Measured:
        """Norms alone, a scaler's factor taken off, and the rows where they are asked for."""
        return cls(norms=norms if scale is None else norms / scale, rows=rows)


def gramian(rows: Sequence[Tensor], ranks: Ranks | None = None, *, share: float = 1.0) -> Tensor:
    r"""Compute the Gramian of K gradients.

    .. math:: G_{ij} = \langle g_i, g_j \rangle

    The sum runs in chunks whose partial results are added in float64. If a square leaves float32's range, or the rows
    are so nearly dependent that rounding would show in what solvers make of them, all is computed again in float64.

    Args:
        rows: ``[K, n_b]`` matrices; together their columns make up the gradients.
        ranks: Where each rank holds columns of its own, so that the products add up; None where each has them all.
        share: What the sum over the ranks is multiplied by: 1 / R² where each rank's columns belong to its own samples,
            and the loss is the mean over the ranks.

    Returns:
        ``[K, K]``, float64, on the CPU.

    Example:
        >>> gramian([torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [1.0]])]).tolist()
        [[6.0, 4.0], [4.0, 10.0]]
    """
    with torch.autocast(rows[0].device.type, enabled=False):
        products = _sum_of_products(rows, torch.float32, ranks, share).cpu()
        if not _is_accurate(products):
            products = _sum_of_products(rows, torch.float64, ranks, share).cpu()
    return products


def _is_accurate(products: Tensor) -> bool:
    """Whether float32 was enough: nothing over- or underflowed, and no combination of unit rows nearly vanishes."""
    matrix = products.numpy()  # a fraction of torch's time on so few numbers
    squares = matrix.diagonal()
    if not np.isfinite(matrix).all() or squares.min() < _SMALLEST_SQUARE:
        return False
    norms = np.sqrt(squares)
    return bool(np.linalg.eigvalsh(matrix / np.outer(norms, norms))[0] > _NEARLY_DEPENDENT)


def _sum_of_products(rows: Sequence[Tensor], at_least: torch.dtype, ranks: Ranks | None, share: float) -> Tensor:
    num_rows = rows[0].shape[0]
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=rows[0].device)
    for block in rows:
        dtype = torch.promote_types(block.dtype, at_least)
        for span in block.split(block.shape[1] if block.dtype == dtype else _SPAN, dim=1):
            wide = span.to(dtype)
            whole = wide.shape[1] // _CHUNK * _CHUNK
            if whole:
                chunks = wide[:, :whole].unflatten(1, (-1, _CHUNK)).transpose(0, 1)
                total += torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64)
            if whole < wide.shape[1]:
                rest = wide[:, whole:]
                total += rest @ rest.mT
    return total if ranks is None or ranks.size == 1 else ranks.sum(total) * share


def row_norms(rows: Sequence[Tensor], ranks: Ranks | None = None, *, share: float = 1.0) -> Tensor:
    """Compute the Euclidean norm of K gradients, ``[K]``, on their device; arguments as in :func:`gramian`.

    Example:
        >>> row_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [2.0]])])
        tensor([5., 2.])
    """
    parts = torch.stack([_norms_of(block) for block in rows])
    if len(parts) == 1 and (ranks is None or ranks.size == 1):
        return parts[0]
    squares = parts.to(torch.float32 if parts.device.type == "mps" else torch.float64).square().sum(0)
    total = squares if ranks is None else ranks.sum(squares) * share
    return total.sqrt().to(parts.dtype)


def _norms_of(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.promote_types(block.dtype, torch.float32))
    # Squares beyond float32 make a norm 0 or infinite; float64 for all rows would take thirty times as long.
    doubtful = torch.logical_not(torch.isfinite(norms) & (norms > _SMALLEST_SQUARE**0.5))
    for row in doubtful.nonzero().flatten().tolist():
        norms[row] = torch.linalg.vector_norm(block[row].double())
    return norms
