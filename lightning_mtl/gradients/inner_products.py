"""Inner products and norms of the tasks' gradients are what most methods read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.devices import WITHOUT_FLOAT64, fetch, numbers, widest
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
        sizes: ``[K]``, the norms on the CPU, where they have been read.
    """

    gramian: Tensor | None = None
    norms: Tensor | None = None
    rows: Sequence[Tensor] = ()
    sizes: Tensor | None = None

    @classmethod
    def of_products(cls, products: Tensor, *, norms_only: bool = False) -> Measured:
        """A Gramian and the norms on its diagonal."""
        norms = products.diagonal().sqrt()
        return cls(norms=norms) if norms_only else cls(gramian=products, norms=norms)

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[Tensor],
        ranks: Ranks | None = None,
        *,
        keeps: bool,
        share: float = 1.0,
        scale: Tensor | None = None,
    ) -> Measured:
        """The norms of K gradients, with these where ``keeps`` says so; other arguments as in :func:`gramian`."""
        if keeps and not rows[0].is_cpu:
            # Methods that read rows need no norms, which are logged: nobody waits for them. Float64 costs a GPU nothing
            # here, for reading the rows takes longer.
            parts = [torch.linalg.vector_norm(row, dim=1, dtype=widest(row.device)).to(rows[0].device) for row in rows]
            squares = torch.stack(parts).square().sum(0)
            norms = ((squares if ranks is None else ranks.sum(squares)) * share).sqrt().to(torch.float32)
            return cls(norms=norms if scale is None else norms / scale, rows=rows)
        norms, sizes = known_norms(rows, ranks, share=share, scale=scale)
        return cls(norms=norms, rows=rows if keeps else (), sizes=sizes)

    def in_order(self, slots: Sequence[int]) -> Measured:
        """Norms and rows in the order of these positions."""

        def of(values: Tensor) -> Tensor:
            return values[numbers(slots, values.device)]

        norms, sizes = (None if values is None else of(values) for values in (self.norms, self.sizes))
        return Measured(norms=norms, rows=[of(block) for block in self.rows], sizes=sizes)


def gramian(
    rows: Sequence[Tensor], ranks: Ranks | None = None, *, share: float = 1.0, scale: Tensor | None = None
) -> Tensor:
    r"""Compute the Gramian of K gradients.

    .. math:: G_{ij} = \langle g_i, g_j \rangle

    The sum runs in chunks whose partial results are added in float64. If a square leaves float32's range, or the rows
    are so nearly dependent that rounding would show in what solvers make of them, all is computed again in float64.

    Args:
        rows: ``[K, n_b]`` matrices; together their columns make up the gradients.
        ranks: Where each rank holds columns of its own, so that the products add up; None where each has them all.
        share: What the sum over the ranks is multiplied by: 1 / R² where each rank's columns belong to its own samples,
            and the loss is the mean over the ranks.
        scale: A gradient scaler's factor in the rows, which is taken off; it travels to the host with the products.

    Returns:
        ``[K, K]``, float64, on the CPU.

    Example:
        >>> gramian([torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [1.0]])]).tolist()
        [[6.0, 4.0], [4.0, 10.0]]
    """
    with torch.autocast(rows[0].device.type, enabled=False):
        products, scale = _on_host(_sum_of_products(rows, torch.float32, ranks, share), scale)
        if not _is_accurate(products):
            if rows[0].device.type in WITHOUT_FLOAT64:
                rows = [block.cpu() for block in rows]
            products, _ = _on_host(_sum_of_products(rows, torch.float64, ranks, share), None)
    return unscaled_products(products, scale)


def _on_host(products: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if scale is None:
        return products.cpu(), None
    products, scale = fetch(products, scale)
    return products, scale


def unscaled_products(products: Tensor, scale: Tensor | None) -> Tensor:
    """The inner products, on the host, without a gradient scaler's factor."""
    return products if scale is None else products / scale.detach().cpu().double().square()


def _is_accurate(products: Tensor) -> bool:
    """Whether float32 was enough: nothing over- or underflowed, and no combination of unit rows nearly vanishes."""
    matrix = products.numpy()  # a fraction of torch's time on so few numbers
    squares = matrix.diagonal()
    if np.isnan(squares).any():
        return True  # a row holds no number, which float64 does not change; squares that overflow are infinite
    if not np.isfinite(matrix).all() or squares.min() < _SMALLEST_SQUARE:
        return False
    norms = np.sqrt(squares)
    return bool(np.linalg.eigvalsh(matrix / np.outer(norms, norms))[0] > _NEARLY_DEPENDENT)


def _sum_of_products(rows: Sequence[Tensor], at_least: torch.dtype, ranks: Ranks | None, share: float) -> Tensor:
    num_rows, device = rows[0].shape[0], rows[0].device
    # Blocks may lie on several devices, and some devices have no float64: partial results are few numbers to move.
    home = torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=home)
    for block in rows:
        dtype = torch.promote_types(block.dtype, at_least)
        for span in block.split(block.shape[1] if block.dtype == dtype else _SPAN, dim=1):
            wide = span.to(dtype)
            whole = wide.shape[1] // _CHUNK * _CHUNK
            if whole:
                chunks = wide[:, :whole].unflatten(1, (-1, _CHUNK)).transpose(0, 1)
                total += torch.bmm(chunks, chunks.mT).to(home).sum(0, dtype=torch.float64)
            if whole < wide.shape[1]:
                rest = wide[:, whole:]
                total += (rest @ rest.mT).to(home)
    return total if ranks is None or ranks.size == 1 else ranks.sum(total) * share


def row_norms(rows: Sequence[Tensor], ranks: Ranks | None = None, *, share: float = 1.0) -> Tensor:
    """Compute the Euclidean norm of K gradients, ``[K]``, on their device; arguments as in :func:`gramian`.

    Example:
        >>> row_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [2.0]])])
        tensor([5., 2.])
    """
    return known_norms(rows, ranks, share=share)[0]


def known_norms(
    rows: Sequence[Tensor], ranks: Ranks | None = None, *, share: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same norms without a gradient scaler's factor, and what the host knows of them: one wait for a device."""
    home = rows[0].device  # asked once: a made block would be made again for each of the others
    parts = torch.stack([_norms_of(block).to(home) for block in rows])
    norms, known = _over_all(parts, ranks, share, scale)
    if known[-1]:
        # Squares beyond float32 make a norm 0 or infinite; float64 for all rows would take thirty times as long.
        parts = torch.stack([_norms_again(block, own) for block, own in zip(rows, parts, strict=True)])
        norms, known = _over_all(parts, ranks, share, scale)
    return norms, known[:-1]


def _over_all(parts: Tensor, ranks: Ranks | None, share: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norms over all blocks and ranks; on the host the same, and how many ranks have a doubtful one."""
    norms, doubtful = parts[0], _doubtful(parts).any().to(parts.dtype)
    if len(parts) > 1 or (ranks is not None and ranks.size > 1):
        squares = parts.to(widest(parts.device)).square().sum(0)
        if ranks is not None and ranks.size > 1:
            # All ranks have to compute again if one has: they learn of it by the same sum.
            both = ranks.sum(torch.cat([squares, doubtful.to(squares).reshape(1)]))
            # A rank without samples has blocks of another dtype: the sum's is the same on all.
            norms, doubtful = (both[:-1] * share).sqrt(), both[-1]
        else:
            norms = squares.sqrt().to(parts.dtype)
    norms = norms if scale is None else norms / scale
    return norms, torch.cat([norms, doubtful.to(norms.dtype).reshape(1)]).cpu()


def _norms_of(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.promote_types(block.dtype, torch.float32))
    return norms


def _doubtful(norms: Tensor) -> Tensor:
    return torch.logical_not(torch.isfinite(norms) & (norms > _SMALLEST_SQUARE**0.5))


def _norms_again(block: Tensor, norms: Tensor) -> Tensor:
    norms = norms.clone()
    for row in _doubtful(norms).nonzero().flatten().tolist():
        found = block[row].cpu() if block.device.type in WITHOUT_FLOAT64 else block[row]
        norms[row] = torch.linalg.vector_norm(found.double())
    return norms


class MadeBlocks(Sequence[Tensor]):
    """Matrices of rows; those of layers are made when they are asked for, so that one at a time is in memory."""

    def __init__(self, rows: Sequence[Tensor], made: Sequence[Callable[[], Tensor]]) -> None:
        self._rows, self._made = rows, made
        self._newest: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._made)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody asks for a slice
        if index < len(self._rows):
            return self._rows[index]
        if self._newest is None or self._newest[0] != index:
            self._newest = None
            self._newest = index, self._made[index - len(self._rows)]()
        return self._newest[1]
