"""Adam on a vector of one number a task, each with its own count of steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Beyond any gradient that means something, and far enough from float32's end to be divided by 1 - β.
LARGEST = 1e36


class AdamState(NamedTuple):
    """First moment, root of the second moment and steps taken, ``[K]`` each; all zero at the start.

    The root, because squares of large gradients leave float32.
    """

    mean: Tensor
    spread: Tensor
    steps: Tensor


def adam_step(
    values: Tensor,
    gradient: Tensor,
    state: AdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, AdamState]:
    r"""Take one Adam step.

    .. math:: v \leftarrow v - \eta \, \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    torch's optimizer does the same on parameters; here the values are a callback's state, ``K`` numbers in one tensor,
    and a task absent from a step keeps its moments and its count t.

    Args:
        values: ``[K]``.
        gradient: ``[K]``.
        state: The moments and counts before the step.
        lr: The step size η.
        betas: The decay rates of the moments.
        eps: Added to the denominator.

    Returns:
        The new values and the new state.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980, algorithm 1.

    Example:
        >>> zero = torch.zeros(2)
        >>> values, _ = adam_step(zero, torch.tensor([3.0, -0.5]), AdamState(zero, zero, zero), lr=0.1)
        >>> values  # the first step has length lr
        tensor([-0.1000,  0.1000])
    """
    steps = state.steps + 1
    gradient = gradient.clamp(-LARGEST, LARGEST)
    mean = torch.lerp(gradient, state.mean, betas[0])
    spread = torch.hypot(betas[1] ** 0.5 * state.spread, (1 - betas[1]) ** 0.5 * gradient)
    step = (mean / (1 - betas[0] ** steps)) / (spread / (1 - betas[1] ** steps).sqrt() + eps)
    return values - lr * step, AdamState(mean, spread, steps)
