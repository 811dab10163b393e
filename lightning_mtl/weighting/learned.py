"""Methods that learn one number a task do so by an Adam with its own count of steps for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Weighting

# Beyond any gradient that means something, and far enough from float32's end to be divided by 1 - β.
LARGEST_GRADIENT = 1e36
# A loss that stays 0 would let its weight grow without end; e^30 is beyond any weight in use, and finite.
LARGEST_LOGARITHM = 30.0


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
    gradient = gradient.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)
    mean = torch.lerp(gradient, state.mean, betas[0])
    spread = torch.hypot(betas[1] ** 0.5 * state.spread, (1 - betas[1]) ** 0.5 * gradient)
    step = (mean / (1 - betas[0] ** steps)) / (spread / (1 - betas[1] ** steps).sqrt() + eps)
    return values - lr * step, AdamState(mean, spread, steps)


class Learned(Weighting):
    """The base of methods that learn one number a task by Adam, whose moments are saved with the numbers.

    Args:
        learned: The state that holds the numbers.
        start: What the numbers are at the start.
        lr: Adam's step size.
        on_cpu: Whether the numbers stay on the CPU, for methods that need them beside Gramians.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, learned: str, start: float = 0.0, *, lr: float, on_cpu: bool = False, **common: Unpack[GradientArguments]
    ) -> None:
        super().__init__(**common)
        if not lr > 0:
            raise ValueError(f"{type(self).__name__}(lr={lr}) must be above 0.")
        self.lr = lr
        for name, value in ((learned, start), ("mean", 0.0), ("spread", 0.0), ("steps", 0.0)):
            self.add_state(name, torch.tensor(value), on_cpu=on_cpu)
        self.mean: Tensor
        self.spread: Tensor
        self.steps: Tensor

    @property
    def adam(self) -> AdamState:
        """Adam's moments and counts."""
        return AdamState(self.mean, self.spread, self.steps)

    @adam.setter
    def adam(self, state: AdamState) -> None:
        self.mean, self.spread, self.steps = state

    def descended(self, values: Tensor, gradient: Tensor) -> Tensor:
        """Take one Adam step from the values, ``[K]``, and keep the moments; return the new values."""
        moved, self.adam = adam_step(values, gradient, self.adam, lr=self.lr)
        return moved
