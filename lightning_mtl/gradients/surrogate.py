"""The surrogate loss: a scalar whose gradient with respect to chosen tensors is already known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

KnownGradients = Callable[[Tensor], Sequence[Tensor]]


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
