"""Learning rates that even out gradient norms of different size."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.learning_rates.factor import Factor, moved
from lightning_mtl.method.base import weighting_of
from lightning_mtl.method.signals import Signals
from lightning_mtl.task.module import TaskModule

SMALLEST_RATIO = 1e-3


def inverse_norms(norms: Tensor, power: float) -> Tensor:
    r"""Compute :math:`(\bar n / n_k)^p`; 1 where a norm is nan because it is not known yet.

    Args:
        norms: ``[K]``. The mean is taken over those that are known; one below a thousandth of it counts as that.
        power: p.

    Example:
        >>> inverse_norms(torch.tensor([1.0, 3.0, torch.nan]), power=1.0)
        tensor([2.0000, 0.6667, 1.0000])
    """
    ratios = norms / norms.nanmean()
    factors = ratios.clamp(min=SMALLEST_RATIO) ** -power
    return torch.where(ratios.isnan(), torch.ones_like(factors), factors)


class GradientNorm(Factor):
    r"""Give tasks with small gradients a larger learning rate, and the other way round.

    .. math:: f_k = \left( \frac{\bar n}{n_k} \right)^{p}, \qquad
        n_k \leftarrow \delta \, n_k + (1 - \delta) \lVert g_k \rVert, \qquad \bar n = \frac{1}{K} \sum_k n_k

    Under plain descent ``power=1`` lets all heads take steps of the same length. Adam's steps have that by themselves:
    there the factor makes the steps of tasks with large gradients shorter than the others'.

    Args:
        power: p; 0 leaves the learning rates alone.
        of: ``"head"`` takes the gradient of the head, as the optimizer gets it: the task's weight included, before
            clipping. It costs no backward pass. ``"shared"`` takes the unweighted gradient of the shared parameters,
            :attr:`Signals.norms`, from a weighting that measures it, in the steps in which it does.
        decay: δ, how much of the mean stays in each step.

    Raises:
        ValueError: If an argument is out of its range, or at setup if nothing measures the shared gradients.

    Source: the inverse norms are those of :class:`~lightning_mtl.weighting.GradientNormBalance`, here on the learning
    rate; You et al., Large Batch Training of Convolutional Networks, 2017, arXiv:1708.03888, set the learning rate of
    each layer in proportion to the norm of its weights over that of its gradient.

    Example:
        >>> factor = GradientNorm(decay=0.0)
        >>> factor.reset(["a", "b"])
        >>> factor.update_heads(torch.tensor([1.0, 3.0]))
        >>> factor.values()
        tensor([2.0000, 0.6667])
    """

    def __init__(self, power: float = 1.0, *, of: Literal["head", "shared"] = "head", decay: float = 0.9) -> None:
        super().__init__()
        if not -10 <= power <= 10:
            raise ValueError(f"GradientNorm(power={power}) must be between -10 and 10.")
        if of not in ("head", "shared"):
            raise ValueError(f"GradientNorm(of={of!r}) must be 'head' or 'shared'.")
        if not 0 <= decay < 1:
            raise ValueError(f"GradientNorm(decay={decay}) must be at least 0 and below 1.")
        self.power, self.of, self.decay = power, of, decay
        self.reads_heads = of == "head"
        self.add_state("norms", torch.tensor(torch.nan))
        self.norms: Tensor

    def check(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:
        """Refuse shared gradients that nothing measures."""
        if self.of == "head":
            return
        weighting = weighting_of(trainer)
        if weighting is None or weighting.measures == "losses":
            found = "without a weighting" if weighting is None else f"with {type(weighting).__name__}"
            raise ValueError(
                f"GradientNorm(of='shared') reads the norms of the shared gradients, which nothing measures {found}; "
                "add a weighting that does, such as GradNorm, GradientNormBalance or MGDA, or use of='head'."
            )

    def values(self) -> Tensor:
        """Compute the inverse of each task's smoothed norm, relative to the mean."""
        return inverse_norms(self.norms, self.power)

    def update(self, signals: Signals) -> None:
        """Read the norms of the shared gradients, where the step measured them."""
        if self.of == "shared" and signals.norms is not None:
            self.norms = moved(self.norms, signals.norms, self.decay)

    def update_heads(self, norms: Tensor) -> None:
        """Read the norms of the heads' gradients."""
        self.norms = moved(self.norms, norms, self.decay)
