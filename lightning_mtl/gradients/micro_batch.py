"""One micro-batch's losses are brought into the form that the gradient engines read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.inner_products import Measured, Wanted
from lightning_mtl.gradients.split import Split

KnownGradients = Callable[[Tensor], Sequence[Tensor]]


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
        starts: What each loss's backward pass starts with, to measure: its share of the mean over the ranks, times a
            gradient scaler's factor; None for 1.
        shares: ``[K]``, the shares alone; None for all ones.
        scale: A gradient scaler's factor, put on while gradients are taken and off again before anyone sees them.
        ranks: The processes that train together.
        unseen: Whether this graph is to be looked at for what cannot be differentiated task by task: the fit's first
            graph is, for a walk takes a microsecond a node, and what a later graph brings is refused by torch itself.
    """

    names: Sequence[str]
    losses: list[Tensor]
    penalty: Tensor | None
    split: Split
    starts: Sequence[Tensor | None]
    absent: Sequence[str] = ()
    shares: Tensor | None = None
    scale: Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)
    unseen: bool = True

    @property
    def with_graph(self) -> list[int]:
        """The tasks, by position, whose losses can be differentiated."""
        return [index for index, loss in enumerate(self.losses) if loss.requires_grad]

    def gradients(self, index: int, inputs: Sequence[Any], *, retain_graph: bool) -> Sequence[Tensor | None]:
        """One task's gradients, scaled, with respect to tensors or edges; None where its loss does not reach."""
        loss = self.losses[index]
        if not inputs or not loss.requires_grad:
            return [None] * len(inputs)
        return torch.autograd.grad(loss, inputs, self.starts[index], retain_graph=retain_graph, allow_unused=True)

    def all_gradients(self, inputs: Sequence[Any], *, retain_graph: bool) -> Sequence[Tensor | None]:
        """The gradients of the sum of all losses with a graph, scaled."""
        losses = [self.losses[index] for index in self.with_graph]
        if not inputs or not losses:
            return [None] * len(inputs)
        seeds = [self.starts[index] for index in self.with_graph]
        return torch.autograd.grad(losses, inputs, seeds, retain_graph=retain_graph, allow_unused=True)

    def backward(self, index: int) -> None:
        """Add one task's gradients, scaled, to those of the leaves; the graph is kept."""
        if self.losses[index].requires_grad:
            torch.autograd.backward(self.losses[index], self.starts[index], retain_graph=True)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ w_k L_k with this rank's shares, unscaled: the loss of plain training with these weights."""
        weights = weights if self.shares is None else weights * self.shares
        return (stack_losses(self.losses, weights.device) * weights).sum()

    def measure(self, wanted: Wanted, layer: Sequence[Tensor] | None = None) -> Measured:
        """Measure nothing: losses alone are weighed here, with no gradient of a task's own."""
        del wanted, layer
        return Measured()

    def surrogate_loss(
        self, weights: Tensor, head_weights: Tensor | None = None, directions: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The weighted sum itself: its ordinary backward pass is the step."""
        del head_weights, directions  # a weighting that has some is given another engine
        return self.with_penalty(self.weighted_sum(weights))

    def with_penalty(self, loss: Tensor) -> Tensor:
        """Add the penalty to a loss."""
        return loss if self.penalty is None else loss + self.penalty


def starts_of(losses: Sequence[Tensor], shares: Tensor | None, scale: Tensor | None) -> list[Tensor | None]:
    """What each loss's backward pass starts with."""
    if not losses or (shares is None and scale is None):
        return [None] * len(losses)
    starts = torch.ones(len(losses), device=losses[0].device) if shares is None else shares
    starts = starts if scale is None else starts * scale
    return [start.to(loss.dtype) for start, loss in zip(starts.unbind(), losses, strict=True)]


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


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: KnownGradients, *inputs: Tensor) -> Tensor:  # noqa: ANN401
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients, ctx.gradients = ctx.gradients, None  # a second reference would make autograd copy them
        # Autograd may call from a thread of its own, in which the caller's autocast is still on.
        with torch.autocast(outer[0].device.type, enabled=False):
            return (None, None, *gradients(outer[0]))


def surrogate(value: Tensor, inputs: Sequence[Tensor], gradients: KnownGradients) -> Tensor:
    """Build a scalar that equals ``value`` and whose gradient with respect to ``inputs`` is already known.

    One ordinary backward pass through the result does the whole update: hooks fire once, a gradient scaler's factor
    arrives as the argument of ``gradients``, and what lies behind ``inputs`` is differentiated as usual.

    Args:
        value: The scalar to report, its graph ignored.
        inputs: Tensors that need gradients, ``n`` of them.
        gradients: Called once in the backward pass with the incoming scalar gradient; returns the ``n`` gradients,
            already multiplied by it.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> surrogate(torch.tensor(5.0), [x], lambda outer: [outer * torch.tensor([1.0, 3.0])]).backward()
        >>> x.grad
        tensor([1., 3.])
    """
    result: Tensor = _Surrogate.apply(value, gradients, *inputs)  # type: ignore[no-untyped-call]
    return result
