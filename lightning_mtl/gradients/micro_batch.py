"""The losses of one micro-batch, as the gradient engines read them, and what they measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.split import Split

Wanted = Literal["nothing", "norms", "gramian", "rows"]


@dataclass
class MicroBatch:
    """One forward pass, before any gradient.

    Attributes:
        names: The K tasks present on some rank.
        losses: This rank's losses of them, each a scalar; one without a graph has no gradient.
        penalty: The sum of the penalties, weight 1, no task; None if there are none. It is never measured: its graph
            runs in the final backward pass.
        split: The trunk's outputs, where they were remembered.
        absent: The tasks that this rank lacks.
        seeds: ``[K]``, what each loss's gradient is multiplied by: the rank's share; None for all ones.
        scale: A gradient scaler's factor, put on while gradients are taken and off again before anyone sees them.
        ranks: The processes that train together.
    """

    names: Sequence[str]
    losses: list[Tensor]
    penalty: Tensor | None
    split: Split
    absent: Sequence[str] = ()
    seeds: Tensor | None = None
    scale: Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)

    def __post_init__(self) -> None:
        self._seeds = self._scaled_seeds()

    def _scaled_seeds(self) -> list[Tensor | None]:
        if not self.losses or (self.seeds is None and self.scale is None):
            return [None] * len(self.losses)
        seeds = torch.ones(len(self.losses), device=self.losses[0].device) if self.seeds is None else self.seeds
        scaled = seeds if self.scale is None else seeds * self.scale
        return [seed.to(loss.dtype) for seed, loss in zip(scaled.unbind(), self.losses, strict=True)]

    @property
    def with_graph(self) -> list[int]:
        """The tasks, by position, whose losses can be differentiated."""
        return [index for index, loss in enumerate(self.losses) if loss.requires_grad]

    def gradients(self, index: int, inputs: Sequence[Any], *, retain_graph: bool) -> Sequence[Tensor | None]:
        """One task's gradients, scaled, with respect to tensors or edges; None where its loss does not reach."""
        loss = self.losses[index]
        if not inputs or not loss.requires_grad:
            return [None] * len(inputs)
        return torch.autograd.grad(loss, inputs, self._seeds[index], retain_graph=retain_graph, allow_unused=True)

    def all_gradients(self, inputs: Sequence[Any], *, retain_graph: bool) -> Sequence[Tensor | None]:
        """The gradients of the sum of all losses with a graph, scaled."""
        losses = [self.losses[index] for index in self.with_graph]
        if not inputs or not losses:
            return [None] * len(inputs)
        seeds = [self._seeds[index] for index in self.with_graph]
        return torch.autograd.grad(losses, inputs, seeds, retain_graph=retain_graph, allow_unused=True)

    def backward(self, index: int) -> None:
        """Add one task's gradients, scaled, to those of the leaves; the graph is kept."""
        if self.losses[index].requires_grad:
            torch.autograd.backward(self.losses[index], self._seeds[index], retain_graph=True)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ w_k L_k with this rank's shares, unscaled: the loss of plain training with these weights."""
        weights = weights if self.seeds is None else weights * self.seeds
        return (stack_losses(self.losses, weights.device) * weights).sum()

    def with_penalty(self, loss: Tensor) -> Tensor:
        """Add the penalty to a loss."""
        return loss if self.penalty is None else loss + self.penalty


def unscaled(outer: Tensor, scale: Tensor | None) -> Tensor:
    """The incoming gradient without the scaler's factor, which measured gradients already have."""
    return outer if scale is None else outer / scale


def stack_losses(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    """The losses as one vector, ``[K]``, of the widest of their dtypes."""
    if not losses:
        return torch.zeros(0, dtype=torch.float32, device=device)
    dtype = losses[0].dtype
    for loss in losses[1:]:
        dtype = torch.promote_types(dtype, loss.dtype)
    return torch.stack([loss if loss.dtype == dtype else loss.to(dtype) for loss in losses])


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


def weighted_sums(per_task: Sequence[dict[Tensor, Tensor]], factors: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Sum the tasks' gradients of each parameter, each times its task's factor."""
    total: dict[Tensor, Tensor] = {}
    for factor, gradients in zip(factors, per_task, strict=True):
        if gradients:
            add_gradients(total, dict(zip(gradients, _scaled(list(gradients.values()), factor), strict=True)))
    return total


def _scaled(gradients: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    if all(gradient.layout is torch.strided for gradient in gradients):
        return torch._foreach_mul(gradients, factor)
    return [gradient * factor for gradient in gradients]


def by_parameter(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """The gradients that there are."""
    return {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def add_gradients(total: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> None:
    """Add gradients to what each parameter has."""
    for parameter, gradient in gradients.items():
        total[parameter] = total[parameter] + gradient if parameter in total else gradient
