"""The rows of the Jacobian: each task's gradient of the shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_mtl.gradients.inner_products import gramian, row_norms
from lightning_mtl.gradients.ranks import Ranks


class Rows:
    """K gradients of the same parameters, side by side: a ``[K, P]`` matrix kept from step to step.

    Memory: K P numbers, plus P for a direction, plus P in passing while a row is copied in. Parameters of different
    dtypes or devices get a matrix each.

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
        self._travelling: list[Callable[[], object]] = []

    def add(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        """Add a gradient to a row; None stands for a parameter that the task does not use.

        Rows are begun in order: 0, 1, 2, ...
        """
        self._used.update(i for i, gradient in enumerate(gradients) if gradient is not None)
        for members, matrix in zip(self._members, self._matrices, strict=True):
            pieces = [
                torch.zeros_like(self.parameters[i]).view(-1) if gradient is None else gradient.reshape(-1)
                for i in members
                for gradient in (gradients[i],)
            ]
            if row in self._filled:
                matrix[row].add_(torch.cat(pieces))
            else:
                torch.cat(pieces, out=matrix[row])
        self._filled.add(row)

    def scale(self, row: int, factor: Tensor | float) -> None:
        """Multiply a row."""
        for matrix in self._matrices:
            matrix[row].mul_(factor)

    @property
    def used(self) -> list[int]:
        """The positions of the parameters that some row's task uses."""
        return sorted(self._used)

    def matrices(self) -> list[Tensor]:
        """The rows written since :meth:`begin`, from the first on: a ``[K, n]`` matrix for each dtype and device."""
        return [matrix[: len(self._filled)] for matrix in self._matrices]

    def begin_sum(self, row: int, ranks: Ranks) -> None:
        """Begin to sum a row over the ranks while others are computed; a row that was not written counts as zero."""
        if row not in self._filled:
            for matrix in self._matrices:
                matrix[row].zero_()
            self._filled.add(row)
        self._travelling += [ranks.begin_sum(matrix[row]) for matrix in self._matrices]

    def end_sums(self, ranks: Ranks) -> None:
        """Wait for the rows under way, and learn which parameters any rank's tasks use."""
        for arrive in self._travelling:
            arrive()
        self._travelling.clear()
        used = torch.zeros(len(self.parameters))
        used[self.used] = 1
        used = ranks.sum(used.to(self._matrices[0].device))
        self._used = set(used.nonzero().flatten().tolist())

    def average_over(self, ranks: Ranks) -> None:
        """Average all rows over the ranks."""
        if ranks.size == 1:
            return
        for matrix in self.matrices():
            ranks.sum(matrix).div_(ranks.size)

    def gramian(self) -> Tensor:
        """The inner products of the rows, ``[K, K]``, float64 on the CPU."""
        return gramian(self.matrices())

    def norms(self) -> Tensor:
        """The norms of the rows, ``[K]``."""
        return row_norms(self.matrices())

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """The direction Σ w_k g_k, one tensor a parameter, None where no task uses it."""
        return self.split([weights.to(matrix) @ matrix for matrix in self.matrices()])

    def split(self, flat: Sequence[Tensor]) -> list[Tensor | None]:
        """Cut directions, ``[n]`` for each matrix, into the parameters' shapes, without a copy."""
        pieces: list[Tensor | None] = [None] * len(self.parameters)
        for members, direction in zip(self._members, flat, strict=True):
            sizes = [self.parameters[i].numel() for i in members]
            for i, end, size in zip(members, accumulate(sizes), sizes, strict=True):
                if i in self._used:
                    pieces[i] = direction[end - size : end].view_as(self.parameters[i])
        return pieces
