"""The rows of the Jacobian are the tasks' gradients of the same parameters, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.inner_products import gramian, row_norms


class Rows:
    """K gradients of the same parameters, side by side: a ``[K, P]`` matrix kept from step to step.

    Memory: K P numbers, plus P for a direction, plus P in passing while a row is copied in. Parameters of different
    dtypes or devices get a matrix each. A sparse gradient is stored dense and its direction handed back sparse. A
    complex number counts as two real ones, so that an inner product is the real part of the complex one.

    Args:
        parameters: The P parameters' tensors, in the order of every gradient passed later.
        num_rows: The largest K that will be written.

    Example:
        >>> w, b = torch.zeros(2, 2), torch.zeros(2)
        >>> rows = Rows([w, b], num_rows=2)
        >>> rows.add(0, [torch.eye(2), None])
        >>> rows.add(1, [torch.ones(2, 2), None])
        >>> rows.gramian().tolist()
        [[2.0, 2.0], [2.0, 4.0]]
        >>> rows.combine(torch.tensor([1.0, 0.5]))[0]
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
        >>> rows.combine(torch.tensor([1.0, 0.5]))[1] is None  # no task uses b
        True
    """

    def __init__(self, parameters: Sequence[Tensor], num_rows: int) -> None:
        self.parameters = list(parameters)
        self.num_rows = num_rows
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, parameter in enumerate(self.parameters):
            groups.setdefault((parameter.dtype, parameter.device), []).append(index)
        self._members = list(groups.values())
        self._matrices = [
            torch.empty(num_rows, sum(self.parameters[i].numel() for i in members), dtype=dtype, device=device)
            for (dtype, device), members in groups.items()
        ]
        self.begin()

    def fits(self, parameters: Sequence[Tensor], num_rows: int) -> bool:
        """Whether this object can be used again for these parameters, in this order, as they are now."""
        return (
            num_rows == self.num_rows
            and len(parameters) == len(self.parameters)
            and all(a is b for a, b in zip(parameters, self.parameters, strict=True))
            and all(
                self.parameters[i].dtype == matrix.dtype and self.parameters[i].device == matrix.device
                for members, matrix in zip(self._members, self._matrices, strict=True)
                for i in members
            )
        )

    def begin(self) -> None:
        """Forget what was written."""
        self._filled: set[int] = set()
        self._used: set[int] = set()
        self._touched: dict[int, Tensor] = {}  # of a parameter with sparse gradients: which of its rows, [n] bools
        self._dense: set[int] = set()  # a sparse and a dense gradient make a dense one
        self._traveling: list[Callable[[], object]] = []

    def add(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        """Add a gradient to a row; None stands for a parameter that the task does not use.

        Rows are begun in order: 0, 1, 2, ...
        """
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._used.add(i)
                if gradient.layout is torch.sparse_coo:
                    self._touch(i, gradient)
                else:
                    self._dense.add(i)
        for members, matrix in zip(self._members, self._matrices, strict=True):
            # One copy into the row: torch.cat writes where the matrix lies, without a concatenated tensor in between.
            pieces = [_flat(gradients[i], self.parameters[i]) for i in members]
            if row in self._filled:
                matrix[row].add_(torch.cat(pieces))
            else:
                torch.cat(pieces, out=matrix[row])
        self._filled.add(row)

    def _touch(self, index: int, gradient: Tensor) -> None:
        touched = self._touched.get(index)
        if touched is None:
            touched = torch.zeros(gradient.shape[0], dtype=torch.bool, device=gradient.device)
            self._touched[index] = touched
        touched[gradient.coalesce().indices()[0]] = True

    def scale(self, row: int, factor: Tensor | float) -> None:
        """Multiply a row."""
        for matrix in self._matrices:
            matrix[row].mul_(factor.to(matrix.device) if isinstance(factor, Tensor) else factor)

    @property
    def used(self) -> list[int]:
        """The positions of the parameters that some row's task uses."""
        return sorted(self._used)

    def used_parameters(self) -> list[Tensor]:
        """The parameters that some row's task uses."""
        return [self.parameters[i] for i in sorted(self._used)]

    def use(self, positions: Iterable[int]) -> None:
        """Count these parameters as used, as where another rank's tasks use them."""
        self._used.update(positions)

    def matrices(self) -> list[Tensor]:
        """The rows written since :meth:`begin`, from the first on: a real ``[K, n]`` matrix a dtype and device."""
        return [as_real(matrix[: len(self._filled)]) for matrix in self._matrices]

    def columns(self, positions: Sequence[int]) -> list[Tensor]:
        """The same rows of some of the parameters alone, real matrices."""
        wanted, found = set(positions), []
        for members, matrix in zip(self._members, self._matrices, strict=True):
            pieces = matrix[: len(self._filled)].split([self.parameters[i].numel() for i in members], dim=1)
            chosen = [piece for i, piece in zip(members, pieces, strict=True) if i in wanted]
            found += [as_real(torch.cat(chosen, dim=1))] if chosen else []
        return found

    def begin_sum(self, row: int, ranks: Ranks) -> None:
        """Begin to sum a row over the ranks while others are computed; a row that was not written counts as zero."""
        if row not in self._filled:
            for matrix in self._matrices:
                matrix[row].zero_()
            self._filled.add(row)
        self._traveling += [ranks.begin_sum(as_real(matrix[row])) for matrix in self._matrices]

    def end_sums(self) -> None:
        """Wait for the rows under way."""
        for arrive in self._traveling:
            arrive()
        self._traveling.clear()
        for index in self._touched:  # other ranks touch other rows
            self._touched[index] = self._nonzero(index)

    def _nonzero(self, index: int) -> Tensor:
        [columns] = self.columns([index])
        return columns.view(len(columns), len(self.parameters[index]), -1).ne(0).any(2).any(0)

    def sum_over(self, ranks: Ranks) -> None:
        """Sum all rows over the ranks."""
        if ranks.size > 1:
            for row in range(self.num_rows):
                self.begin_sum(row, ranks)
            self.end_sums()

    def gramian(self) -> Tensor:
        """The inner products of the rows, ``[K, K]``, float64 on the CPU."""
        return gramian(self.matrices())

    def norms(self) -> Tensor:
        """The norms of the rows, ``[K]``."""
        return row_norms(self.matrices())

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """The direction Σ w_k g_k, one tensor a parameter, None where no task uses it."""
        return self.split([weighed_sum(weights, matrix) for matrix in self.matrices()])

    def split(self, flat: Sequence[Tensor]) -> list[Tensor | None]:
        """Split directions, ``[n]`` for each matrix, into the parameters' shapes."""
        pieces: list[Tensor | None] = [None] * len(self.parameters)
        for members, matrix, direction in zip(self._members, self._matrices, flat, strict=True):
            whole = torch.view_as_complex(direction.view(-1, 2)) if matrix.is_complex() else direction
            sizes = [self.parameters[i].numel() for i in members]
            for i, end, size in zip(members, accumulate(sizes), sizes, strict=True):
                if i in self._used:
                    piece = whole[end - size : end].view_as(self.parameters[i])
                    pieces[i] = _rows_of(piece, self._touched[i]) if i in self._touched.keys() - self._dense else piece
        return pieces


def weighed_sum(weights: Tensor, matrix: Tensor) -> Tensor:
    """Σ w_k g_k of the rows of a matrix, ``[n]``, in its dtype."""
    rounded = weights.to(matrix)
    if matrix.dtype not in (torch.float16, torch.bfloat16):
        return rounded @ matrix
    # Weights of eight bits are wrong by 0.2 to 0.4 %, which is every number's error then: what they lack goes along.
    rest = (weights.to(matrix.device) - rounded.to(weights.dtype)).to(matrix)
    return (torch.stack([rounded, rest]) @ matrix).sum(0)


def rows_for(kept: list[Rows], parameters: Sequence[Tensor], num_rows: int) -> Rows:
    """Begin rows of these parameters in the matrix of an earlier step, if it fits; else in one that is kept instead."""
    if not (kept and kept[0].fits(parameters, num_rows)):
        kept.clear()  # before the new matrix: two need not be in memory at once
        kept.append(Rows(parameters, num_rows))
    kept[0].begin()
    return kept[0]


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter).view(-1)
    return (gradient if gradient.layout is torch.strided else gradient.to_dense()).reshape(-1)


def as_real(matrix: Tensor) -> Tensor:
    """The same rows, complex numbers as pairs of real ones."""
    return torch.view_as_real(matrix).flatten(-2) if matrix.is_complex() else matrix


def _rows_of(dense: Tensor, touched: Tensor) -> Tensor:
    """The same gradient, sparse again: SparseAdam, for one, takes no other."""
    index = touched.nonzero().T
    return torch.sparse_coo_tensor(index, dense[index[0]], dense.shape, is_coalesced=True)


def weighted_sums(per_task: Sequence[dict[Tensor, Tensor]], factors: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Sum the tasks' gradients of each parameter, each times its task's factor."""
    total: dict[Tensor, Tensor] = {}
    for factor, gradients in zip(factors, per_task, strict=True):
        if gradients:
            add_gradients(total, dict(zip(gradients, _scaled(list(gradients.values()), factor), strict=True)))
    return total


def _scaled(gradients: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    if all(gradient.layout is torch.strided and gradient.device == factor.device for gradient in gradients):
        return torch._foreach_mul(gradients, factor)
    return [gradient * factor.to(gradient.device) for gradient in gradients]


def by_parameter(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """The gradients that there are."""
    return {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def add_gradients(total: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> None:
    """Add gradients to what each parameter has."""
    for parameter, gradient in gradients.items():
        total[parameter] = total[parameter] + gradient if parameter in total else gradient


def in_order(gradients: dict[Tensor, Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """One gradient for each parameter, zero where there is none."""
    return [gradients[p] if p in gradients else torch.zeros_like(p) for p in parameters]


def reached_anywhere(ranks: Ranks, parameters: Sequence[Tensor], reached: Iterable[Tensor]) -> set[Tensor]:
    """Those of the parameters that some rank reaches."""
    own = set(reached)
    flags = torch.tensor([float(parameter in own) for parameter in parameters], device=parameters[0].device)
    flags = ranks.sum(flags)
    return {parameter for parameter, flag in zip(parameters, flags.tolist(), strict=True) if flag}
