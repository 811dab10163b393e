"""LRAnnealing brings the mean gradient of each loss up to the largest entry of the main one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Decision, Signals

# The mean of a gradient may be next to nothing beside the largest entry; no weight of use is larger.
LARGEST = 1e30


def largest_over_means(rows: Sequence[Tensor], main: int) -> Tensor:
    r"""Compute :math:`\max_p |g_{1p}| \,/\, \frac{1}{P} \sum_p |g_{kp}|`, ``[K]``; not a number for a zero gradient.

    Args:
        rows: ``[K, n]`` matrices whose columns together make up the gradients.
        main: Which row gives the maximum.

    Example:
        >>> largest_over_means([torch.tensor([[3.0, -1.0], [0.5, 0.5], [0.0, 0.0]])], main=0)
        tensor([1.5000, 6.0000,    nan])
    """
    home, size = rows[0].device, sum(block.shape[1] for block in rows)
    largest = torch.stack([block[main].abs().max().to(home, torch.float32) for block in rows]).max()
    # Divided first: the sum of large entries in half precision may be no number any more.
    means = sum((block.abs().float() / size).sum(1).to(home) for block in rows)
    means = torch.as_tensor(means)
    return torch.where((means > 0) & (largest > 0), (largest / means).clamp(max=LARGEST), torch.nan)


class LRAnnealing(Weighting):
    r"""Weigh each loss so that its mean gradient becomes as large as the main loss's largest: learning rate annealing.

    .. math:: \lambda_k \leftarrow (1 - \alpha) \lambda_k + \alpha
        \frac{\max_p |\partial L_1 / \partial \theta_p|}{\operatorname{mean}_p |\partial L_k / \partial \theta_p|},
        \qquad w_k = \lambda_k

    with λ = 1 at the start and :math:`w_1 = 1` for the main loss, the residual of a differential equation. Where the
    main task is absent, or a gradient is zero, :math:`\lambda_k` stays. The weights scale the heads, too. Since a
    largest entry is compared with means, the others weigh more than the main loss even where all gradients are alike. A
    condition that is met has a gradient near 0, and its weight grows without end: look at ``weight/<task>``.

    Each task's whole gradient is needed in the steps that measure: ``every_n_steps=10``, as in the official code, makes
    most of them plain. A sharded trunk (FSDP2) has no such rows, and is refused.

    When: the conditions of a differential equation are not learned beside its residual, and are no zero values.

    Args:
        alpha: α, above 0 and at most 1: the share of the newest ratio.
        main: The task that keeps weight 1; None for the module's first.
        every_n_steps: Measure in one step of n and keep the weights in between.
        at: ``"trunk"``, where the rows are.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``main`` is no task.

    Source: Wang, Teng and Perdikaris, Understanding and Mitigating Gradient Pathologies in Physics-Informed Neural
    Networks, 2021, arXiv:2001.04536, algorithm 1.

    Deviations: the official code divides by the mean gradient of the loss that λ already weighs, so that its λ settles
    at the ratio's square root, and leaves biases out; both are as in the paper here.

    Example:
        >>> LRAnnealing(main="residual", every_n_steps=10).alpha
        0.1
    """

    measures: ClassVar[Measure] = "rows"
    search_space: ClassVar[SearchSpace] = {"alpha": Range(1e-2, 1.0, log=True)}

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        main: str | None = None,
        every_n_steps: int = 1,
        at: Literal["trunk"] = "trunk",
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(at=at, every_n_steps=every_n_steps, **common)
        if not 0 < alpha <= 1:
            raise ValueError(f"LRAnnealing(alpha={alpha}) must be above 0 and at most 1.")
        if at != "trunk":
            raise ValueError(
                f"LRAnnealing(at={at!r}) compares single entries of gradients, which the shared parameters have; use "
                "at='trunk'."
            )
        self.alpha, self.main = alpha, main
        self.add_state("lambdas", torch.tensor(1.0))
        self.lambdas: Tensor
        self._coming: tuple[int, Tensor] | None = None  # the step, and what λ becomes if it is taken

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse a main task that there is not."""
        tasks = list(pl_module.tasks)  # type: ignore[arg-type]  # setup has seen a mapping
        if self.main is not None and self.main not in tasks:
            raise ValueError(f"LRAnnealing(main={self.main!r}) is none of the tasks {tasks}.")

    def decide(
        self, signals: Signals, present: Sequence[int], *, measured: bool, rows: Sequence[Tensor] = ()
    ) -> Decision:
        """Move λ by this step's gradients."""
        main = self.tasks[0] if self.main is None else self.main
        if rows and main in signals.tasks:
            with self._cut_to(present):
                found = largest_over_means(rows, signals.tasks.index(main)).to(self.lambdas)
                found[signals.tasks.index(main)] = 1.0
                lambdas = torch.where(found.isnan(), self.lambdas, torch.lerp(self.lambdas, found, self.alpha))
            self._coming = signals.step, lambdas
        return super().decide(signals, present, measured=measured)

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by λ as it comes out of this step, or as it was."""
        coming = self._coming
        return self.lambdas if coming is None or coming[0] != signals.step else coming[1]

    def update(self, signals: Signals) -> None:
        """Keep λ."""
        if self._coming is not None and self._coming[0] == signals.step:  # measured, and not skipped
            self.lambdas = self._coming[1]
        self._coming = None
